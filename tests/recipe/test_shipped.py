"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from actvar_convert.errors import RecipeError
from actvar_convert.recipe import copy_recipe, load_recipe, shipped_recipes


def test_they_are_found() -> None:
    assert {"fashion", "ci"} <= set(shipped_recipes())


def test_a_copy_keeps_the_comments_and_replaces_nothing(tmp_path: Path) -> None:
    path = copy_recipe("fashion", tmp_path)
    assert path == tmp_path / "fashion.yaml"
    assert path.read_bytes() == shipped_recipes()["fashion"].read_bytes() and b"#" in path.read_bytes()
    assert load_recipe(path) == load_recipe("fashion")
    with pytest.raises(RecipeError, match="exists already"):
        copy_recipe("fashion", path)


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'fashion'"):
        copy_recipe("fashoin", tmp_path)
