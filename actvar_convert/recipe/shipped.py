"""The recipes that come with the package."""

from __future__ import annotations

import difflib
import os
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from actvar_convert.errors import RecipeError
from actvar_convert.system.atomic import write_whole
from actvar_convert.system.paths import path_of


def shipped_recipes() -> dict[str, Traversable]:
    """The shipped recipe files by name, in alphabetical order."""
    found = {
        entry.name.removesuffix(".yaml"): entry
        for entry in files("actvar_convert_recipes").iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def copy_recipe(name: str, target: str | os.PathLike[str] | None = None) -> Path:
    """Copies a shipped recipe, comments included, to a file to be edited; returns the file.

    Args:
        name: name of the shipped recipe.
        target: the new file, or a folder for it; ``NAME.yaml`` in the working directory by default.

    Raises:
        RecipeError: no such recipe, or the file exists already.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        close = difflib.get_close_matches(name, list(shipped), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"recipe {name!r} is not shipped{hint} Shipped are {', '.join(shipped)}")
    path = path_of(target) if target is not None else Path(f"{name}.yaml")
    if path.is_dir():
        path = path / f"{name}.yaml"
    if path.exists():
        raise RecipeError(f"{path} exists already; give another file, or remove it first")
    write_whole(path, shipped[name].read_bytes())
    return path
