"""Shipped recipes: one YAML file each, found through importlib.resources."""
