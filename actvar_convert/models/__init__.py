"""The networks: pure tensors, no files, no recipes, no printing."""
