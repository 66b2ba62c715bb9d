"""Checks of a recipe: absolute limits and comparison with an earlier evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from actvar_convert.cost.flops import FlopsReport, count_flops
from actvar_convert.errors import ChecksFailed, InputError
from actvar_convert.measure.checks import MEASURED_BY, require_comparable, run_checks
from actvar_convert.measure.distances import summarise
from actvar_convert.measure.quality_report import QualityReport
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import BlockPlan, SparsityPlan

CONFIG = TransformerConfig(depth=1, width=32, heads=2, hidden=64, sides=(1, 2, 4), vocab=16, z_channels=8, classes=3)

NO_IMAGES = dict.fromkeys(("fid", "inception_score", "precision", "recall", "label_agreement", "extractor"))


@dataclass(frozen=True)
class Limits:
    max_flops_ratio: float | None = None
    max_kl: float | None = None
    max_fid_increase: float | None = None
    max_distance: float | None = None


@pytest.fixture
def flops() -> FlopsReport:
    half = SparsityPlan(experts=4, blocks=(BlockPlan(prefix=(4, 4, 1), routed=(0, 0, 1), keep=(1, 1, 1)),))
    return count_flops(CONFIG, None, {"half": half}, "half")


def quality(
    increase: float = 0.02,
    kl: float = 0.03,
    standard_error: float | None = None,
    jackknife: float = 0.01,
    kl_error: float = 0.001,
    images: int = 5000,
) -> QualityReport:
    pair = {"dense": 2.0, "sparse": 2.0, "dense_per_seed": [2.0], "sparse_per_seed": [2.0]}
    fid = {
        **pair,
        "tokenizer": None,
        "increase": increase,
        "standard_error": standard_error,
        "jackknife_error": jackknife,
    }
    data: dict[str, Any] = {
        "schema": "actvar.eval/1",
        "images": images,
        "seeds": [0],
        "sampling": {"cfg": 1.5, "top_k": 0, "top_p": 0.0, "chunk": 64},
        "dtype": "float32",
        "extractor": "tiny",
        "plan": "half",
        "fid": fid,
        "inception_score": pair,
        "precision": None,
        "recall": None,
        "label_agreement": None,
        "kl": {"mean": kl, "per_scale": [0.0, 0.0, kl], "standard_error": kl_error, "pyramids": 512},
        "agreement": {"top1": 0.9, "per_scale": [1.0, 1.0, 0.85]},
    }
    return QualityReport.model_validate(data)


def test_limits_that_hold(flops: FlopsReport) -> None:
    table = run_checks(Limits(max_flops_ratio=0.9, max_kl=0.05, max_fid_increase=0.05), flops, quality())
    assert table.passed and [row.name for row in table.rows] == ["flops_ratio", "kl", "fid_increase"]
    assert flops.reduction is not None
    assert table.rows[0].given == pytest.approx(1 - flops.reduction.transformer)
    table.raise_if_failed()


def test_failure_shows_given_against_allowed(flops: FlopsReport) -> None:
    table = run_checks(Limits(max_flops_ratio=0.9, max_kl=0.02), flops, quality(kl=0.03))
    with pytest.raises(ChecksFailed) as caught:
        table.raise_if_failed()
    assert caught.value.exit_code == 3
    text = str(caught.value)
    assert "1 of 2 checks failed" in text
    row = next(line for line in text.splitlines() if line.startswith("kl"))
    assert row.split() == ["kl", "0.0300", "0.0200", "FAILED", "checks.max_kl"]


def test_a_distance_beyond_its_limit_fails_with_3(flops: FlopsReport) -> None:
    measured = quality().model_copy(
        update={"distances": summarise(torch.tensor([0.1, 0.3]), None, seed=0), "fid": None, "extractor": None}
    )
    assert run_checks(Limits(max_distance=0.21), flops, measured).passed
    with pytest.raises(ChecksFailed) as caught:
        run_checks(Limits(max_distance=0.1), flops, measured).raise_if_failed()
    assert caught.value.exit_code == 3
    row = str(caught.value).splitlines()[-1]
    assert row.split() == ["distance", "0.200", "0.100", "FAILED", "checks.max_distance"]
    with pytest.raises(InputError, match="max_distance needs pictures of both models"):
        run_checks(Limits(max_distance=0.1), flops, quality())


def test_nothing_asked_is_nothing_failed(flops: FlopsReport) -> None:
    table = run_checks(Limits(), flops, quality(increase=9.0))
    assert table.rows == () and table.passed


def test_dense_flops_cannot_be_limited() -> None:
    with pytest.raises(InputError, match="needs a sparse model"):
        run_checks(Limits(max_flops_ratio=0.9), count_flops(CONFIG), quality())


@pytest.mark.parametrize(
    ("increase", "standard_error", "passed"),
    [
        (0.02, None, True),
        (0.02 + 2.8 * 0.01, None, True),
        (0.02 + 2.9 * 0.01, None, False),
        (0.02 + 2.9 * 0.01, 0.02, True),
        (0.02 + 2.9 * 0.01, 0.001, False),
    ],
)
def test_baseline_allows_two_errors_of_the_difference(
    flops: FlopsReport, increase: float, standard_error: float | None, passed: bool
) -> None:
    now = quality(increase, standard_error=standard_error)
    assert run_checks(Limits(), flops, now, quality(0.02)).passed is passed


def test_baseline_watches_the_kl(flops: FlopsReport) -> None:
    table = run_checks(Limits(), flops, quality(kl=0.034), quality(kl=0.03))
    assert [row.passed for row in table.rows] == [True, False]
    assert "baseline 0.0300 + noise 0.0028" in table.to_text()


def test_without_images_the_kl_alone_is_watched(flops: FlopsReport) -> None:
    now, before = (quality(kl=kl).model_copy(update={**NO_IMAGES, "images": 0}) for kl in (0.031, 0.03))
    table = run_checks(Limits(max_kl=0.05), flops, now, before)
    assert [(row.name, row.passed) for row in table.rows] == [("kl", True), ("kl", True)]
    with pytest.raises(InputError, match=r"max_fid_increase needs a FID.*evaluate\.reference"):
        run_checks(Limits(max_fid_increase=0.1), flops, now)
    with pytest.raises(InputError, match=r"(?s)images: 5000 in the baseline, 0 now.*extractor: tiny in the baseline"):
        run_checks(Limits(), flops, now, quality())


def test_baseline_of_another_measurement_is_refused(flops: FlopsReport) -> None:
    with pytest.raises(InputError, match="images: 1000 in the baseline, 5000 now"):
        run_checks(Limits(), flops, quality(), quality(images=1000))
    now = quality()
    planned = {name: getattr(now, name) for name in MEASURED_BY}
    require_comparable(quality(kl=9.0), planned)
    with pytest.raises(InputError, match=r"(?s)images: 5000 in the baseline, 7 now.*extractor: tiny in the baseline"):
        require_comparable(now, {**planned, "images": 7, "extractor": "other"})
    with pytest.raises(InputError, match="reference: None in the baseline, of others now"):
        require_comparable(now, {**planned, "reference": "of others"})
