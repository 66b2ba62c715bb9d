"""Recipes: what to do, as frozen values read from YAML."""

from actvar_convert.recipe.check import check_recipe, problems_for
from actvar_convert.recipe.fields import Setting, settings
from actvar_convert.recipe.load import dump_recipe, load_recipe
from actvar_convert.recipe.schema import Recipe, StageRecipe, settled
from actvar_convert.recipe.shipped import copy_recipe, shipped_recipes

__all__ = [
    "Recipe",
    "Setting",
    "StageRecipe",
    "check_recipe",
    "copy_recipe",
    "dump_recipe",
    "load_recipe",
    "problems_for",
    "settings",
    "settled",
    "shipped_recipes",
]
