"""Settings changed one at a time on the tiny model: rows are made once, and each change acts on its base."""

from __future__ import annotations

import json
from pathlib import Path

import defaults
import pytest
from defaults import BASES, CHANGES, Defaults, settings_of, table

from actvar_convert.models.model import Model
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe


def test_rows_are_measured_once(
    tiny_model: Model, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny_recipe, ["budget.pyramids=16"])
    made = Defaults(tiny_model, recipe, tmp_path)
    rows = [
        made.row("routed", change) for change in ("", "experts.clustering=gradient", "experts.compensation=sequential")
    ]
    assert len({row.kl for row in rows}) == 3
    assert all(row.cut == pytest.approx(0.2, abs=0.05) and row.kl > 0 and row.seconds > 0 for row in rows)

    monkeypatch.delattr(Defaults, "_measured")
    assert [Defaults(tiny_model, recipe, tmp_path).row("routed", row.change) for row in rows] == rows
    content = json.loads((tmp_path / "defaults.json").read_text())
    assert [row["key"] for row in content["rows"]] == [row.key for row in rows]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| routed | - |") and lines[2].endswith("| - |")
    assert f"| {100 * (rows[1].kl / rows[0].kl - 1):+.1f} |" in lines[3]


def test_trained_rows_share_their_conversion(tiny_model: Model, tiny_recipe: Recipe, tmp_path: Path) -> None:
    small = load_recipe(tiny_recipe, ["distill.stage1.batch=4", "distill.stage2.batch=4"])
    made = Defaults(tiny_model, small, tmp_path)
    itself, longer, untrained = (
        made.row("trained", change) for change in ("", "distill.stage2.gate=frozen", "distill.stage2.trainable=none")
    )
    assert len({row.kl for row in (itself, longer, untrained)}) == 3 and itself.cut == longer.cut
    stored = [path for path in (tmp_path / "models").glob("*.safetensors") if "state" not in path.name]
    assert len(stored) == 1 + 1 + 3, "one conversion, one first stage, three second stages"


@pytest.mark.parametrize(("base", "change"), [(base, change) for base in BASES for change in CHANGES[base]])
def test_every_change_is_one(base: str, change: str) -> None:
    """A row that says what the base says already would claim that the setting is worth nothing."""
    recipe = load_recipe("fashion", BASES[base])
    assert load_recipe(recipe, settings_of(change)) != recipe
    assert set(defaults.CHANGES) == set(BASES)


def test_a_row_may_change_settings_that_belong_together() -> None:
    both = "distill.stage2.optimizer=adamw + distill.stage2.learning_rate=0.0003"
    changed = load_recipe("fashion", settings_of(both)).distill.stage2
    assert changed.optimizer == "adamw" and changed.learning_rate == 3e-4
    assert settings_of("") == []
