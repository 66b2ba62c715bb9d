"""The settings: every one explained, frozen, and with sensible defaults per stage."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from actvar_convert.recipe import Recipe, settings
from actvar_convert.recipe.fields import find, nearest
from actvar_convert.recipe.schema import PHASES, deciding, settled

RECIPE = Recipe(name="r", model="m")


def test_every_setting_says_what_it_means_and_what_is_allowed() -> None:
    paths = [setting.path for setting in settings()]
    assert len(paths) == len(set(paths)) > 40
    for setting in settings():
        if not setting.path.startswith("plans.NAME.blocks"):
            assert setting.info.description, f"{setting.path} has no description"
        assert setting.allowed


def test_recipes_cannot_be_changed_and_know_no_other_keys() -> None:
    with pytest.raises(ValidationError):
        RECIPE.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        Recipe(name="r", model="m", sede=3)  # type: ignore[call-arg]
    assert hash(RECIPE) == hash(Recipe(name="r", model="m"))


def test_seeds_are_what_a_generator_takes() -> None:
    with pytest.raises(ValidationError, match="less than 9223372036854775808"):
        Recipe.model_validate({"name": "r", "model": "m", "evaluate": {"seeds": [0, 2**63]}})
    recipe = Recipe.model_validate({"name": "r", "model": "m", "evaluate": {"seeds": [2**63 - 1]}})
    torch.Generator().manual_seed(recipe.evaluate.seeds[0])


def test_dtypes_by_torchs_names() -> None:
    given = {"dtype": "bfloat16", "benchmark": {"dtypes": ["float16", "fp32"]}}
    recipe = Recipe.model_validate({"name": "r", "model": "m", **given})
    assert (recipe.dtype, recipe.benchmark.dtypes) == ("bf16", ("fp16", "fp32"))
    with pytest.raises(ValidationError, match="'fp32' or 'bf16'"):
        Recipe.model_validate({"name": "r", "model": "m", "dtype": "float16"})


def test_the_stages_differ_in_what_trains() -> None:
    one, two = RECIPE.distill.stage1, RECIPE.distill.stage2
    assert {*type(two).model_fields} - {*type(one).model_fields} == {"trainable", "lora_rank", "gate"}
    assert (two.gate, two.trainable) == ("train", "all")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("experts.count", "a whole number of at least 1"),
        ("budget.reduction", "a number of more than 0 and less than 1"),
        ("experts.clustering", "one of kmeans, gradient"),
        ("benchmark.dtypes", "a list of any of fp32, bf16, fp16, 1 or more"),
        ("distill.stage2.learning_rate", "a number of more than 0"),
        ("benchmark", "a section with the keys batches, dtypes"),
        ("dtype", "one of fp32, bf16"),
        ("model", "text, not empty"),
        ("seed", "a whole number of at least 0 and less than 4294967296"),
        ("evaluate.seeds", "a list of whole numbers of at least 0 and less than 9223372036854775808, 1 or more"),
    ],
)
def test_what_is_allowed_in_words(path: str, allowed: str) -> None:
    setting = find(path.split("."))
    assert setting is not None and setting.allowed == allowed


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("distill.stage2.stpes", "distill.stage2.steps"),
        ("experts.cuont", "experts.count"),
        ("steps", "distill.stage1.steps or distill.stage2.steps"),
        ("distil.stage2.steps", "distill.stage2.steps"),
        ("plans.fast.exprts", "plans.fast.experts"),
        ("zzzzzz", None),
    ],
)
def test_the_nearest_valid_name(written: str, meant: str | None) -> None:
    assert find(written.split(".")) is None
    assert nearest(written.split(".")) == meant


def test_every_section_says_what_it_decides() -> None:
    assert list(PHASES) == list(Recipe.model_fields)
    assert {"calibration", "experts", "budget", "plans"} <= set(settled()) and "data" not in settled()
    assert "held_out" not in deciding(RECIPE, "convert", "train") and "held_out" in deciding(RECIPE, "measure")
