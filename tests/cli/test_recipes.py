"""The commands around shipped recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import actvar_convert as av
from actvar_convert import preflight
from actvar_convert.recipe import load_recipe, settings, shipped_recipes

from .conftest import Actvar


def test_list(actvar: Actvar) -> None:
    table = actvar("recipes", "list").stdout
    listed = json.loads(actvar("recipes", "list", "--format", "json").stdout)
    assert [row["name"] for row in listed] == list(shipped_recipes())
    for row in listed:
        assert row["description"] in table and row["model"] == load_recipe(row["name"]).model


def test_show_prints_a_recipe_that_can_be_used(actvar: Actvar, tmp_path: Path) -> None:
    result = actvar("recipes", "show", "fashion", "--set", "seed=3")
    (tmp_path / "shown.yaml").write_text(result.stdout)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("fashion", ["seed=3"])


def test_explain_says_what_every_setting_means(actvar: Actvar, tmp_path: Path) -> None:
    text = actvar("recipes", "show", "ci", "--explain").stdout
    (tmp_path / "shown.yaml").write_text(text)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("ci")
    for setting in settings():
        if not setting.path.startswith("plans."):
            assert f"# {setting.info.description}" in text


def test_copy_validate_and_back(actvar: Actvar, tmp_path: Path) -> None:
    assert actvar("recipes", "copy", "ci", "mine.yaml").stdout == "mine.yaml\n"
    found = actvar("recipes", "validate", "mine.yaml", "var_d16")
    assert found.exit_code == 0, found.output
    names = [line for line in found.stdout.splitlines() if not line.startswith(" ")]
    assert names == ["mine.yaml: ok", "var_d16: ok"]
    for said in ("VAR-d16: 16 blocks", "GFLOPs per image, 30.2 % saved", "estimated memory: convert 3.2 GB, distill"):
        assert said in found.stdout
    assert re.search(r"  convert needs 3\.2 GB, [\d.]+ GB are free here: (fits|does not fit)\n", found.stdout)
    again = actvar("recipes", "copy", "ci", "mine.yaml")
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_validate_says_whether_the_machine_has_the_memory(actvar: Actvar, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(preflight, "free_memory_bytes", lambda device=None: int(22.4e9 if device is None else 80e9))
    monkeypatch.setattr(preflight, "pick_device", lambda name=None: torch.device("cuda"))
    found = av.validate_recipe("var_d36")
    convert, distill = (f"{size / 1e9:.1f} GB" for size in (found.convert_bytes, found.distill_bytes))
    alone = actvar("recipes", "validate", "var_d36").stdout.splitlines()
    assert alone[-4:] == [
        f"  estimated memory: convert {convert}, distill {distill} on one device",
        f"  convert needs {convert}, 22.4 GB are free here: fits",
        f"  distill on cuda needs {distill}, 80.0 GB are free here: does not fit",
        "  --processes N [--shard] estimates the memory of each of N GPUs instead",
    ]
    shared, split = (av.validate_recipe("var_d36", processes=8, sharded=sharded) for sharded in (False, True))
    assert split.distill_bytes < 0.7 * shared.distill_bytes < 0.3 * found.distill_bytes
    eight = actvar("recipes", "validate", "var_d36", "--processes", 8).stdout.splitlines()
    assert eight[-1] == f"  distill on cuda needs {shared.distill_bytes / 1e9:.1f} GB, 80.0 GB are free here: fits"
    assert eight[-3].endswith(f"distill {shared.distill_bytes / 1e9:.1f} GB on each of 8 devices")
    sharded = actvar("recipes", "validate", "var_d36", "--processes", 8, "--shard").stdout.splitlines()
    assert sharded[-3].endswith(f"distill {split.distill_bytes / 1e9:.1f} GB on each of 8 devices, sharded")
    monkeypatch.setattr(preflight, "pick_device", lambda name=None: torch.device("cpu"))
    together = actvar("recipes", "validate", "var_d36", "--processes", 8).stdout
    said = f"{8 * shared.distill_bytes / 1e9:.1f} GB (8 of {shared.distill_bytes / 1e9:.1f} GB)"
    assert f"distill on cpu needs {said}, 80.0 GB are free here: does not fit\n" in together
    for given, said in (
        (["--shard"], "give --processes too"),
        (["--processes", 16], "distill.stage2.batch: given 8, for 16 processes at least 16"),
    ):
        refused = actvar("recipes", "validate", "var_d36", *given)
        assert refused.exit_code == 2 and said in refused.stderr


def test_validate_names_the_problems_of_all_files(actvar: Actvar, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nmodle: x\n")
    (tmp_path / "b.yaml").write_text("name: b\nmodel: x\nexperts: {count: 0}\n")
    result = actvar("recipes", "validate", "a.yaml", "b.yaml", "ci")
    assert result.exit_code == 2 and result.stdout.startswith("ci: ok\n")
    for said in ("recipe a.yaml", "modle: unknown key", "recipe b.yaml", "experts.count: given 0"):
        assert said in result.stderr
