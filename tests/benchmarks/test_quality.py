"""The frontier on the tiny model: every method gives a row, rows and weights are made once, stopped work goes on."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import quality
import torch
from quality import Frontier, Given, Wanted, wanted_rows
from rivals import METHODS
from rivals.method import Level
from rivals.training import Workshop

from actvar_convert.distillation import loop
from actvar_convert.distillation.loop import Upkeep, distill_model
from actvar_convert.errors import InputError, Interrupted
from actvar_convert.measure.agreement import compare_logits
from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.models.model import Model
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import SilentProgress


def frontier(teacher: Model, recipe: Recipe, folder: Path, extractor: ClassifierExtractor) -> Frontier:
    return Frontier(teacher, recipe, folder, extractor, SilentProgress())


def given(*arguments: str) -> Given:
    return quality.parser().parse_args(arguments, namespace=Given())


class Quiet:
    """A task that tells nobody."""

    def advance(self, n: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def test_every_method_gives_rows_once(
    tiny_model: Model,
    tiny_recipe: Recipe,
    tmp_path: Path,
    tiny_extractor: ClassifierExtractor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *others = METHODS
    wanted = wanted_rows([first], ["none", "stage1", "full"], [0.15])
    for name in others:
        wanted += wanted_rows([name], ["full"], [max(0.15, METHODS[name].least)])
    made = frontier(tiny_model, tiny_recipe, tmp_path, tiny_extractor)
    rows = [made.row(each) for each in wanted]
    named = [(row.method, row.level) for row in rows]
    assert len(set(named)) == len(rows) and {row.method for row in rows} == set(METHODS)
    assert named[:3] == [("ours", "none"), ("ours", "stage1"), ("ours", "full")]
    for row in rows:
        assert row.fid_dense == rows[0].fid_dense > 0 and row.images == 20 and row.dtype == "float32"
        least = max(0.15, METHODS[row.method].least)
        assert row.cut == 0 if row.method == "control" else least <= row.cut < max(0.5, least + 0.1)
        assert row.kl > 1e-4 or row.method == "control"
        assert row.error == max(row.jackknife_error, row.standard_error or 0)
        assert sum(row.steps) == {"none": 0, "stage1": 2, "full": 5}[row.level]

    monkeypatch.setattr(quality, "evaluate_models", None)
    again = frontier(tiny_model, tiny_recipe, tmp_path, tiny_extractor)
    assert [again.row(each) for each in wanted] == rows
    again.write(rows)
    content = json.loads((tmp_path / "quality.json").read_text())
    assert [row["key"] for row in content["rows"]] == [row.key for row in rows]
    assert content["teacher"] == made.workshop.teacher_print
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    lines = quality.table(rows).splitlines()
    assert len(lines) == len(rows) + 2 and lines[2].startswith("| ours | none | - | 15.0 |")


def test_a_row_depends_on_what_it_shows(
    tiny_model: Model, tiny_recipe: Recipe, tmp_path: Path, tiny_extractor: ClassifierExtractor
) -> None:
    method = METHODS["early-exit"]

    def keys(*changes: str, cut: float = 0.2) -> tuple[str, str, str]:
        made = frontier(tiny_model, load_recipe(tiny_recipe, changes), tmp_path, tiny_extractor)
        own = made.workshop.keys(method, method.recipe(made.recipe, cut, tiny_model.config), cut)
        return made.key(Wanted(method, "full", cut)), own["full"], own["none"]

    row, full, none = keys()
    assert keys() == (row, full, none)
    more_images = keys("evaluate.images=40")
    assert more_images[0] != row and more_images[1:] == (full, none)
    longer = keys("distill.stage2.steps=4")
    assert longer[0] != row and longer[1] != full and longer[2] == none
    assert not set(keys(cut=0.3)) & {row, full, none}
    with torch.no_grad():
        tiny_model.transformer.head.bias.add_(1)
    assert not set(keys()) & {row, full, none}


def test_levels_in_parts_are_both_stages_in_one_run(tiny_model: Model, tiny_recipe: Recipe, tmp_path: Path) -> None:
    method, config = METHODS["static-width"], tiny_model.config
    recipe = method.recipe(load_recipe(tiny_recipe, []), 0.15, config)
    workshop = Workshop(tiny_model, tmp_path / "parts")
    whole = method.build(tiny_model, recipe, 0.15, SilentProgress(), None).student
    state, store = tmp_path / "state.safetensors", workshop.store(recipe)
    upkeep = Upkeep(SilentProgress(), state_path=state, fingerprint="whole")
    distill_model(whole, tiny_model, recipe, store, upkeep)
    workshop.make(method, recipe, 0.15, "stage1")
    parts = Workshop(tiny_model, tmp_path / "parts").make(method, recipe, 0.15, "full").student
    expected = whole.transformer.state_dict()
    for name, tensor in parts.transformer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert parts.plan == whole.plan


@pytest.mark.parametrize("name", ["early-exit", "small-model"])
def test_a_stopped_training_goes_on(
    tiny_model: Model, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    method, config = METHODS[name], tiny_model.config
    recipe = method.recipe(tiny_recipe, 0.15, config)
    expected = Workshop(tiny_model, tmp_path / "whole").make(method, recipe, 0.15, "full")
    original, taken = loop.StageRun.train_step, 0

    def counting(self: loop.StageRun, *args: object) -> dict[str, float]:
        nonlocal taken
        taken += 1
        if taken == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.StageRun, "train_step", counting)
    with pytest.raises(Interrupted):
        Workshop(tiny_model, tmp_path / "parts").make(method, recipe, 0.15, "full")
    resumed = Workshop(tiny_model, tmp_path / "parts").make(method, recipe, 0.15, "full")
    assert taken == 5, "the two steps before the stop are not repeated"
    Workshop(tiny_model, tmp_path / "parts").make(method, recipe, 0.15, "full")
    assert taken == 5, "a finished training is not repeated"
    weights = expected.student.transformer.state_dict()
    for key, tensor in resumed.student.transformer.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    labels = [0, 1, 2]
    assert torch.equal(resumed.model.generate_tokens(labels), expected.model.generate_tokens(labels))
    assert sorted(path.suffix for path in (tmp_path / "parts" / "models").iterdir()) == [".jsonl", ".safetensors"]


@pytest.mark.parametrize(
    ("name", "rate", "left"),
    [
        ("token-skipping", 2e-3, 0.8),
        ("token-merging", 3e-4, 0.95),
        ("early-exit", 2e-3, 0.8),
        ("small-model", 2e-3, 0.8),
    ],
)
def test_a_rival_learns(
    tiny_model: Model, tiny_recipe: Recipe, tmp_path: Path, name: str, rate: float, left: float
) -> None:
    method, config = METHODS[name], tiny_model.config
    longer = ("distill.stage2.steps=30", f"distill.stage2.learning_rate={rate}", "distill.stage2.warmup=3")
    recipe = load_recipe(method.recipe(tiny_recipe, 0.25, config), longer)
    workshop = Workshop(tiny_model, tmp_path)
    store = workshop.store(recipe)
    tokens, condition = store.tokens, store.condition
    levels: tuple[Level, Level] = ("none", "full")
    before, after = (
        compare_logits(workshop.make(method, recipe, 0.25, level).model, tiny_model, tokens, condition, Quiet())
        for level in levels
    )
    assert float(after.kl_NS.mean()) < left * float(before.kl_NS.mean())
    if name == "small-model":
        assert float(after.kl_NS[:, :2].abs().max()) < 1e-6 < float(after.kl_NS[:, 2:].min())


def test_training_leaves_the_teacher_alone(tiny_model: Model, tiny_recipe: Recipe, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    for name in ("control", "small-model"):
        method = METHODS[name]
        recipe = method.recipe(tiny_recipe, 0.15, tiny_model.config)
        Workshop(tiny_model, tmp_path).make(method, recipe, 0.15, "full")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_what_can_be_asked_for() -> None:
    rows = wanted_rows(["ours", "small-model", "control"], ["none", "full"], [0.2, 0.4])
    assert [(row.method.name, row.level, row.cut) for row in rows] == [
        ("ours", "none", 0.2),
        ("ours", "none", 0.4),
        ("ours", "full", 0.2),
        ("ours", "full", 0.4),
        ("small-model", "full", 0.2),
        ("small-model", "full", 0.4),
        ("control", "full", 0.0),
    ]
    recipe = quality.recipe_of(given("--steps", "7", "9", "--seeds", "3", "4", "--dtype", "fp32", "--set", "seed=5"))
    assert (recipe.distill.stage1.steps, recipe.distill.stage2.steps, recipe.seed) == (7, 9, 5)
    assert recipe.evaluate.seeds == (3, 4) and recipe.evaluate.images == 10_000
    assert recipe.dtype == "fp32"
    quick = quality.recipe_of(given("--quick", "--images", "30"))
    assert quick.evaluate.images == 30 and quick.evaluate.seeds == (0,) and quick.distill.stage2.steps < 5
    with pytest.raises(InputError, match="--cuts"):
        quality.run(given("--cuts", "0.2", "1.5"))


def test_every_method_trains_as_many_steps(tiny_model: Model, tiny_recipe: Recipe) -> None:
    config = tiny_model.config
    for name, method in METHODS.items():
        stages = method.recipe(tiny_recipe, 0.15, config).distill
        assert stages.stage1.steps + stages.stage2.steps == 5, name
        assert stages.stage2.batch == 8 and stages.stage2.trainable == "all", name


def test_rows_of_other_runs_are_shown_beside_new_ones(tmp_path: Path) -> None:
    row = quality.Row(
        key="k", method="ours", level="full", steps=(20, 120), asked=0.3, cut=0.301, macs=9, kl=0.06, kl_error=0.001,
        fid_dense=0.5, fid=0.6, increase=0.2, standard_error=None, jackknife_error=0.02, label_agreement=None, images=9,
        seeds=(0,), dtype="float32",
    )  # fmt: skip
    newer, rival = replace(row, kl=0.05), replace(row, method="control", asked=0.0)
    milder = replace(row, asked=0.2)
    assert quality.merged([newer, milder], [rival, row]) == [milder, newer, rival]

    def stored(**changes: object) -> Path:
        content = {"schema": quality.SCHEMA, "teacher": "mine", "rows": [asdict(row)], **changes}
        (tmp_path / "quality.json").write_text(json.dumps(content))
        return tmp_path / "quality.json"

    assert quality.earlier_rows(stored(), "mine") == [row]
    wrong: list[tuple[dict[str, object], str]] = [
        ({"teacher": "other"}, "another teacher"),
        ({"rows": [{"kl": 1.0}]}, "no quality.json"),
        ({"rows": [asdict(replace(row, method="unheard-of"))]}, "no quality.json"),
        ({"schema": "actvar.quality/1"}, "no quality.json"),
    ]
    for changes, why in wrong:
        with pytest.raises(InputError, match=why):
            quality.earlier_rows(stored(**changes), "mine")
    with pytest.raises(InputError, match="cannot be read"):
        quality.earlier_rows(tmp_path / "absent.json", "mine")
