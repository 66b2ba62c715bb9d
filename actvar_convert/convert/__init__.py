"""From a dense VAR to a sparse one: calibration, clustering, routers and gates, budgets."""
