"""docs/extending.md says what works: its blocks run in order, and do what it says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actvar_convert.distillation.stages import JOINT
from actvar_convert.models.families import FAMILIES
from actvar_convert.models.gate import GatedBlock
from actvar_convert.models.model import Model
from actvar_convert.models.split import expert_ffns, gated_blocks
from actvar_convert.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPE: dict[str, Any] = {
    "name": "short",
    "model": "tiny",
    "calibration": {"pyramids": 8, "batch": 4},
    "experts": {"count": 8},
    "gate": {"rank": 4},
    "budget": {"reduction": 0.2, "gate_keep": 0.4, "gate_scales": 2, "pyramids": 8},
    "data": {"pyramids": 16, "batch": 8},
    "distill": {"stage1": {"steps": 1, "batch": 4, "warmup": 1}, "stage2": {"steps": 2, "batch": 4, "warmup": 1}},
}


def test_the_examples_run(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "writing", FAMILIES["var"])  # taken back afterwards
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    names: dict[str, Any] = {"dense": tiny_model, "recipe": Recipe.model_validate(RECIPE), "out": tmp_path / "out"}
    monkeypatch.setitem(JOINT, "brier", (1.0, lambda step: None))  # taken back afterwards
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3

    exec(blocks[0], names)
    gated = list(gated_blocks(names["sparse"].transformer))
    assert gated and names["images"].isfinite().all()
    x = torch.zeros(1, 16, 64)
    x[0, 5], x[0, 11] = 3.0, -2.0
    assert gated[0].gate.choose(x, 2).kept.tolist() == [[5, 11]]

    exec(blocks[1], names)
    student, started = names["student"].transformer, names["sparse"].transformer
    pairs = zip(expert_ffns(student), expert_ffns(started), strict=True)
    moved = [not torch.equal(own.fc1.weight, old.fc1.weight) for own, old in pairs]
    assert all(moved)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    joint = [line for line in lines if line.get("stage") == "stage2"]
    assert joint and all(0 < line["brier"] < 1 and "kl" in line for line in joint)

    exec(blocks[2], names)
    assert names["pictures"].shape == (2, 3, 3, 5) and 0.15 < names["saved"] < 0.3
    assert any(isinstance(block, GatedBlock) for block in names["written"].transformer.blocks)


def test_files_that_the_pages_name_are_there() -> None:
    for page in ("architecture.md", "extending.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        named = {name for name in re.findall(r"`((?:[\w]+/)+[\w.]*\.(?:py|md))`", text)}
        assert len(named) > 5
        for name in named:
            assert (ROOT / "actvar_convert" / name).exists() or (ROOT / name).exists(), name


def test_the_map_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = [line for line in text.splitlines() if line.startswith("|")]
    for folder in ("files", "conversion", "distillation", "measure", "show", "recipe", "cost"):
        for path in (ROOT / "actvar_convert" / folder).glob("[a-z]*.py"):
            assert any(path.name in line for line in listed), path
