"""The sweep of a tiny model: its points, cuts out of reach, resuming, the limit, and what is left on disk."""

from __future__ import annotations

import copy
import csv
import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import actvar_convert as av
from actvar_convert import sweep as sweep_verb
from actvar_convert import verbs
from actvar_convert.conversion.converter import convert_model
from actvar_convert.errors import InputError, RecipeError
from actvar_convert.measure.agreement import HELD_OUT_SEED, compare_logits
from actvar_convert.measure.cuts import SweepReport
from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.model import Model
from actvar_convert.models.sampling import balanced_labels
from actvar_convert.recipe.schema import Recipe
from actvar_convert.show.tables import SWEEP_COLUMNS
from actvar_convert.system.progress import SilentProgress

MODULE = import_module("actvar_convert.sweeps")
HELD_OUT = 6


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": "tiny",
        "experts": {"count": 8},
        "gate": {"rank": 4},
        "calibration": {"pyramids": 12, "batch": 6},
        "evaluate": {"held_out": HELD_OUT, "batch": 4},
    }
    return Recipe.model_validate(settings | changes)


class Conversions:
    """Counts conversions, and can be told to be interrupted before one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.done, self.stop_at = 0, stop_at
        monkeypatch.setattr(MODULE, "convert_model", self)

    def __call__(self, *given: Any, **named: Any) -> Model:
        if self.done == self.stop_at:
            raise KeyboardInterrupt
        self.done += 1
        return convert_model(*given, **named)


def test_a_point_is_what_convert_gives(tiny_model: Model) -> None:
    report = av.sweep(tiny_model, recipe=recipe(), reductions=(0.3, 0.1, 0.3))
    assert [point.target for point in report.points] == [0.1, 0.3]
    tokens = tiny_model.generate_tokens(balanced_labels(HELD_OUT, 5), seed=HELD_OUT_SEED, chunk=4)
    for point in report.points:
        own = recipe(budget={"reduction": point.target})
        sparse = verbs.convert(tiny_model, recipe=own)
        with SilentProgress().task("") as task:
            found = compare_logits(sparse, tiny_model, tokens, balanced_labels(HELD_OUT, 5), task)
        kl, top1 = found.per_token(found.kl_NS), found.per_token(found.top1_NS)
        assert point.kl is not None and point.agreement is not None
        assert point.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4) and point.kl.mean > 0
        assert point.kl.standard_error == pytest.approx(float(kl.std()) / HELD_OUT**0.5, rel=1e-4)
        assert point.agreement.top1 == pytest.approx(float(top1.mean()))
        flops = av.report_flops(sparse)
        assert flops.sparse is not None and flops.reduction is not None
        assert point.flops == flops.sparse.transformer.flops and point.macs == point.flops // 2
        assert point.reduction == flops.reduction.transformer >= point.target
        assert point.reduction_end_to_end == flops.reduction.end_to_end
        assert point.fid is None and point.expected_kl is not None and point.problem is None
    assert report.dense_flops == av.report_flops(tiny_model).dense.transformer.flops
    assert (report.held_out, report.calibration_pyramids, report.chosen) == (HELD_OUT, 12, None)
    folded = recipe(budget={"guidance": "folded"})
    assert av.sweep(tiny_model, recipe=folded, reductions=(0.3, 0.1)) == report, "nothing teaches it here"


def test_a_search_looks_once_and_every_plan_meets_its_target(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    inner = MODULE.calibration_store
    monkeypatch.setattr(MODULE, "calibration_store", lambda *a, **b: seen.append(1) or inner(*a, **b))
    named = recipe(budget={"plans": {"best": 0.05}}, default_plan="best")
    report = av.sweep(tiny_model, recipe=named, reductions=(0.1, 0.3))
    assert seen == [1]
    low, high = report.points
    for point in (low, high):
        assert point.reduction is not None and point.reduction >= point.target
        assert point.expected_kl is not None and point.expected_kl > 0
    assert high.expected_kl is not None and low.expected_kl is not None and high.expected_kl > low.expected_kl


def test_a_cut_out_of_reach_is_a_row_and_costs_nothing(tiny_model: Model, tmp_path: Path) -> None:
    class Strict(SilentProgress):
        def task(self, description: str, total: int | None = None) -> Any:
            raise AssertionError(f"{description}: work was begun")

    report = av.sweep(tiny_model, recipe=recipe(), reductions=(0.95,), out=tmp_path / "s", progress=Strict())
    point = report.at(0.95)
    assert point.problem is not None and "out of reach" in point.problem
    assert point.kl is None and point.reduction is None and point.flops is None
    assert not (tmp_path / "s.work").exists()
    both = av.sweep(tiny_model, recipe=recipe(), reductions=(0.1,), out=tmp_path / "s")
    assert [each.problem is None for each in both.points] == [True, False]
    with pytest.raises(KeyError):
        both.at(0.2)


def test_an_interrupted_sweep_goes_on_and_a_later_one_adds(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts, out = (0.1, 0.2, 0.3), tmp_path / "runs" / "s"
    whole = av.sweep(tiny_model, recipe=recipe(), reductions=cuts)
    Conversions(monkeypatch, stop_at=1)
    with pytest.raises(KeyboardInterrupt):
        av.sweep(tiny_model, recipe=recipe(), reductions=cuts, out=out)
    left = SweepReport.model_validate_json((out / "sweep.json").read_bytes())
    assert [point.target for point in left.points] == [0.1] and (tmp_path / "runs" / "s.work").is_dir()
    rest = Conversions(monkeypatch)
    resumed = av.sweep(tiny_model, recipe=recipe(), reductions=cuts, out=out)
    assert rest.done == 2 and resumed == whole
    assert sorted(path.name for path in out.iterdir()) == ["sweep.csv", "sweep.json", "sweep.png"]
    assert not (tmp_path / "runs" / "s.work").exists()

    more = Conversions(monkeypatch)
    added = av.sweep(tiny_model, recipe=recipe(description="another"), reductions=(0.15, 0.2), out=out)
    assert more.done == 1 and [point.target for point in added.points] == [0.1, 0.15, 0.2, 0.3]
    assert [added.at(target) for target in cuts] == list(whole.points)

    assert json.loads((out / "sweep.json").read_text())["schema"] == "actvar.sweep/1"
    rows = list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))
    assert tuple(rows[0]) == SWEEP_COLUMNS and [float(row["target"]) for row in rows] == [0.1, 0.15, 0.2, 0.3]
    kl = added.points[1].kl
    assert kl is not None and float(rows[1]["kl"]) == kl.mean and rows[1]["fid_sparse"] == ""
    with Image.open(out / "sweep.png") as picture:
        assert picture.format == "PNG" and picture.height > picture.width / 2
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10, "something is drawn"


def test_the_largest_cut_within_a_limit(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def within(limit: float | None) -> float | None:
        report = av.sweep(tiny_model, recipe=recipe(), reductions=(0.1, 0.3), max_kl=limit, out=tmp_path / "s")
        assert report.max_kl == limit
        return report.chosen

    assert within(None) is None
    stored = Conversions(monkeypatch)
    first, second = (
        point.kl.mean
        for point in SweepReport.model_validate_json((tmp_path / "s/sweep.json").read_bytes()).points
        if point.kl is not None
    )
    assert first < second
    assert (within(first / 2), within(first), within(second)) == (None, 0.1, 0.3)
    assert stored.done == 0


def test_another_sweep_and_other_things_are_left_alone(tiny_model: Model, tmp_path: Path) -> None:
    out = tmp_path / "s"
    av.sweep(tiny_model, recipe=recipe(), reductions=(0.95,), out=out)
    before = (out / "sweep.json").read_bytes()
    for given in (recipe(seed=1), recipe(evaluate={"held_out": 7, "batch": 4})):
        with pytest.raises(InputError, match=r"sweep\.json is a sweep of another model, with other settings"):
            av.sweep(tiny_model, recipe=given, reductions=(0.95,), out=out)
    drawing = copy.copy(tiny_model)
    drawing.sampling = tiny_model.sampling._replace(cfg=4.0)
    with pytest.raises(InputError, match="is a sweep of another model"):
        av.sweep(drawing, recipe=recipe(), reductions=(0.95,), out=out)
    (out / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match="choose another folder"):
        av.sweep(tiny_model, recipe=recipe(), reductions=(0.95,), out=out)
    (out / "sweep.json").write_bytes(before)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("")
    for place in ("notes", "file"):
        with pytest.raises(InputError, match="holds no sweep"):
            av.sweep(tiny_model, recipe=recipe(), reductions=(0.1,), out=tmp_path / place)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_problems_are_named_together_and_first(tiny_model: Model, tiny_sparse: Model) -> None:
    with pytest.raises(InputError) as raised:
        av.sweep(tiny_model, recipe=recipe(), reductions=(0.1, 0.0, 1.2), images=3, max_kl=-1.0)
    assert len(raised.value.problems) == 3
    for said in ("reductions: [0.0, 1.2]", "images: 3", "max_kl: -1.0"):
        assert said in str(raised.value)
    with pytest.raises(InputError, match="reductions: none"):
        av.sweep(tiny_model, recipe=recipe(), reductions=())
    with pytest.raises(InputError, match="sparse already"):
        av.sweep(tiny_sparse, recipe=recipe())
    with pytest.raises(RecipeError, match="a divisor of the 128 hidden neurons"):
        av.sweep(tiny_model, recipe=recipe(experts={"count": 24}))
    with pytest.raises(InputError, match="judge this model's images"):
        av.sweep(tiny_model, recipe=recipe(), images=20)


def test_fid_joins_the_points_if_images_are_asked_for(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    classifier = FashionClassifier(classes=5).eval()
    with torch.inference_mode():
        features = classifier.features(torch.rand(40, 3, 8, 8))
    judge = ClassifierExtractor(classifier, features, name="tiny", image_size=8)
    monkeypatch.setattr(verbs, "extractor_for", lambda model, reference: judge)
    out = tmp_path / "s"
    plain = av.sweep(tiny_model, recipe=recipe(), reductions=(0.3,), out=out).at(0.3)
    judged = av.sweep(tiny_model, recipe=recipe(), reductions=(0.3,), images=20, out=out).at(0.3)
    assert plain.fid is None and judged.fid is not None and judged.kl == plain.kl
    fid = judged.fid
    assert fid.images == 20 and fid.dense > 0 and fid.jackknife_error > 0
    assert fid.increase == pytest.approx((fid.sparse - fid.dense) / fid.dense)
    again = Conversions(monkeypatch)
    kept = av.sweep(tiny_model, recipe=recipe(), reductions=(0.3,), out=out)
    assert again.done == 0 and kept.at(0.3) == judged, "figures that are there already stay"


def test_a_sweep_is_one_of_the_content_of_its_images(tiny_model: Model, tmp_path: Path) -> None:
    paths = [tmp_path / "images" / str(label) / f"{i}.png" for label in range(5) for i in range(3)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(path)
    given = recipe(data={"images": str(tmp_path / "images")})
    first = av.sweep(tiny_model, recipe=given, reductions=(0.3,), out=tmp_path / "out")
    assert av.sweep(tiny_model, recipe=given, reductions=(0.3,), out=tmp_path / "out") == first
    for path in paths:
        Image.new("RGB", (8, 8), (0, 99, 0)).save(path)
    with pytest.raises(InputError, match="with other settings or images"):
        av.sweep(tiny_model, recipe=given, reductions=(0.3,), out=tmp_path / "out")
    paths[0].write_bytes(b"broken")
    with pytest.raises(InputError, match=r"data\.images: .*1 of 15 images"):
        av.sweep(tiny_model, recipe=given, reductions=(0.4,))


def test_the_verb_is_public() -> None:
    assert sweep_verb is av.sweep and callable(av.sweep)
