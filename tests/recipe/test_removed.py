"""Settings that recipes had once: refused with what replaced them, and dropped from recipes of format version 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actvar_convert.errors import RecipeError
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe import Recipe, load_recipe
from actvar_convert.recipe.fields import find
from actvar_convert.recipe.removed import REMOVED

TINY = TransformerConfig(depth=2, width=64, heads=2, hidden=128, sides=(1, 2, 3, 4), vocab=32, z_channels=8, classes=5)
PLAN = SparsityPlan.dense(TINY, experts=16).model_dump(mode="json")


def stored(folder: Path, recipe: dict[str, object], version: int = 1) -> Path:
    """A recipe as a sparse folder holds it."""
    (folder / "config.json").write_text(json.dumps({"format": "actvar-sparse", "format_version": version}))
    (folder / "recipe.yaml").write_text(json.dumps({"name": "a", "model": "m", **recipe}))
    return folder


def test_no_setting_is_both_there_and_removed() -> None:
    assert [path for path in REMOVED if find(path.replace("N.", "0.").split("."))] == []
    assert all(text and text[0].islower() and text[-1] != "." for _, text in REMOVED.values())


def test_a_removed_setting_is_refused_with_what_replaced_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: a\nmodel: m\nsparsify: {steps: 3}\ngate: {skipped_kv: dropped, rnak: 3}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["distill.stage1.plans=random"])
    assert caught.value.problems == [
        "distill.stage1.plans: removed; give distill.plans, which holds for both stages",
        "gate.skipped_kv: removed; keys and values of skipped tokens are left out",
        "gate.rnak: unknown key; did you mean gate.rank?",
        "sparsify: removed; neurons are clustered as the model has them",
    ]


def test_a_removed_setting_of_a_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    blocks = [{**block, "threshold": None} for block in PLAN["blocks"]]
    path.write_text(json.dumps({"name": "a", "model": "m", "plans": {"fast": {**PLAN, "blocks": blocks}}}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems[0].startswith("plans.fast.blocks[0].threshold: removed; a router picks")


def test_recipes_of_version_1_lose_kept_values(tmp_path: Path) -> None:
    plan = {**PLAN, "skipped_kv": "computed", "reconstruction": "mixture", "neighbourhood": 1}
    more: dict[str, object] = {
        "sparsify": {"steps": 0, "batch": 7},
        "heads": 4,
        "sides": None,
        "data": {"source": "teacher", "images": "unused", "dtype": "fp32"},
        "gate": {"rank": 8, "skipped_kv": "dropped"},
        "budget": {"guidance": "folded"},
        "distill": {"stage2": {"steps": 3, "hidden": 0.0, "checkpoint_every": 7}},
        "plans": {"fast": {**plan, "guidance": "folded", "reconstruction_rank": 8}},
    }
    recipe = load_recipe(stored(tmp_path, more))
    assert (recipe.gate.rank, recipe.distill.stage2.steps) == (8, 3)
    assert (recipe.shape.heads, recipe.shape.sides, recipe.data.images) == (4, None, None)
    assert recipe.plans is not None and recipe.plans["fast"].reconstruction_rank == 8
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(RecipeError):
        load_recipe(stored(tmp_path, more, version=2))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sparsify": {"steps": 3}}, "sparsify.steps is 3, allowed: 0"),
        ({"distill": {"stage2": {"hidden": 0.0}}}, "distill.stage2.hidden is 0.0, allowed: 0.1"),
        ({"plans": {"fast": {**PLAN, "router_width": 8}}}, "plans.fast.router_width is 8, allowed: 0"),
    ],
)
def test_recipes_of_version_1_with_other_values_are_refused(tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=r"actvar-convert 0\.1 reads it") as caught:
        load_recipe(stored(tmp_path, more))
    assert caught.value.problems == [said]


def test_a_recipe_in_memory_is_not_of_version_1() -> None:
    assert load_recipe(Recipe(name="a", model="m")).name == "a"
