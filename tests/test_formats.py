"""docs/formats.md names what the reports hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from actvar_convert.cost.flops import FlopsReport
from actvar_convert.files.inspection import Inspection
from actvar_convert.files.sparse_folder import SparseConfig
from actvar_convert.measure.cuts import SweepPoint, SweepReport
from actvar_convert.measure.latency import BenchmarkReport, BenchmarkRow
from actvar_convert.measure.quality_report import (
    DistanceSpread,
    FidQuality,
    KLQuality,
    PairDistances,
    QualityReport,
    RoutingLoad,
    WorstPair,
)
from actvar_convert.plan import BlockPlan, SparsityPlan

TEXT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in TEXT.split("\n## ")[1:]}


@pytest.mark.parametrize(
    ("section", "models"),
    [
        ("The sparse folder", (SparseConfig, SparsityPlan, BlockPlan)),
        ("`flops.json`: `actvar.flops/1`", (FlopsReport,)),
        ("`eval.json`: `actvar.eval/1`", (QualityReport, FidQuality, KLQuality)),
        ("`eval.json`: `actvar.eval/1`", (PairDistances, DistanceSpread, WorstPair)),
        ("`benchmark.json`: `actvar.benchmark/1`", (BenchmarkReport, BenchmarkRow)),
        ("`sweep.json`: `actvar.sweep/1`", (SweepReport, SweepPoint)),
        ("`actvar inspect X --format json`: `actvar.inspect/1`", (Inspection,)),
    ],
)
def test_every_field_is_named(section: str, models: tuple[type[BaseModel], ...]) -> None:
    named = set(re.findall(r"`(\w+)`", SECTIONS[section]))
    fields = {name for model in models for name in model.model_fields}
    assert fields - named <= {"format", "schema_"}, "both stand in a file as schema"


def test_routing_is_described_in_full() -> None:
    described = SECTIONS["`eval.json`: `actvar.eval/1`"]
    assert all(f"`{name}`" in described for name in RoutingLoad.model_fields if name not in ("block", "scale"))
