"""Two-stage distillation of a sparse VAR from its dense teacher."""
