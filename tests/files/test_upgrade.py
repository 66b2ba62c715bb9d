"""Sparse folders of version 1: settings that are gone are dropped if they had the kept value, else refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actvar_convert.errors import CheckpointError
from actvar_convert.files.sparse_folder import load_sparse, read_provenance, save_sparse
from actvar_convert.models.model import Model
from actvar_convert.recipe.shape import Shape

PLAN: dict[str, object] = {
    "neighbourhood": 1,
    "router_width": 0,
    "reconstruction": "mixture",
    "skipped_kv": "dropped",
}
"""Settings of a plan of version 1 at the values that became the rule."""
BLOCK: dict[str, object] = {"threshold": None, "mean_routed": None}
"""The same of a block."""


def written_before(folder: Path, plan: dict[str, object], block: dict[str, object], constant: float = 0.0) -> Path:
    """Makes a folder one of version 1: its plans have these settings too, its inactive experts add a constant."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["family"]
    content["provenance"] |= {"heads": 2, "sides": [1, 2, 3, 4]}
    for each in content["plans"].values():
        each.update(plan)
        each["blocks"][1].update(block)
    path.write_text(json.dumps({**content, "format_version": 1}))
    tensors = load_file(folder / "model.safetensors")
    added = {f"blocks.{block}.ffn.inactive": torch.full((4, 8, 64), constant) for block in (0, 1)}
    save_file(tensors | added, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path: Path, sparse: Model) -> Path:
    return save_sparse(sparse, tmp_path / "tiny", provenance={}, recipe_text="name: tiny\n")


def test_kept_values_are_dropped(folder: Path, sparse: Model, same_model: Callable[[Model, Model], None]) -> None:
    model = load_sparse(written_before(folder, PLAN, BLOCK))
    same_model(model, sparse)
    assert model.plans == sparse.plans
    assert read_provenance(folder).shape == Shape(heads=2, sides=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("plan", "block", "said"),
    [
        ({"neighbourhood": 2}, {}, "neighbourhood is 2, allowed: 1"),
        ({"router_width": 8}, {}, "router_width is 8, allowed: 0"),
        ({"skipped_kv": "computed"}, {}, "plans.default.skipped_kv is 'computed', allowed: 'dropped'"),
        ({"reconstruction": "previous"}, {}, "plans.default.reconstruction is 'previous', allowed: 'mixture'"),
        ({}, {"threshold": [None, None, None, 0.5]}, "blocks.1.threshold is [None, None, None, 0.5], allowed: None"),
    ],
)
def test_other_values_are_refused_by_name(
    folder: Path, plan: dict[str, object], block: dict[str, object], said: str
) -> None:
    written_before(folder, PLAN | plan, BLOCK | block)
    with pytest.raises(CheckpointError, match=r"actvar-convert 0\.1 reads it") as caught:
        load_sparse(folder)
    assert said in str(caught.value)
    assert "Restore" not in str(caught.value), "a copy would be of version 1 too"
    assert str(caught.value).count("reads it") == 1


def test_keys_and_values_were_computed_if_a_plan_did_not_say(folder: Path) -> None:
    written_before(folder, {key: value for key, value in PLAN.items() if key != "skipped_kv"}, BLOCK)
    with pytest.raises(CheckpointError, match=r"0\.1 reads it") as caught:
        load_sparse(folder)
    assert "plans.default.skipped_kv is 'computed'" in str(caught.value)
    assert "plans.all" not in str(caught.value), "a plan that skips no token says nothing by it"


def test_constants_of_inactive_experts_are_refused_by_name(folder: Path) -> None:
    written_before(folder, PLAN, BLOCK, constant=0.1)
    with pytest.raises(CheckpointError, match=r"actvar-convert 0\.1 reads it") as caught:
        load_sparse(folder)
    assert "experts.inactive: inactive experts add constants" in str(caught.value)
    assert "Restore" not in str(caught.value) and str(caught.value).count("reads it") == 1
