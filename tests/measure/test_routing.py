"""Loads of routers, as an evaluation reports them."""

from __future__ import annotations

import pytest
import torch

import actvar_convert as av
from actvar_convert.measure.quality_report import QualityReport
from actvar_convert.measure.routing import RoutingWatch, watched_routing
from actvar_convert.models.model import Model
from actvar_convert.models.split import expert_ffns
from actvar_convert.show.html import report_html
from actvar_convert.show.tables import Reports, quality_tables

from ..show.test_tables import printed


@pytest.fixture
def report(tiny_sparse: Model, tiny_model: Model) -> QualityReport:
    return av.evaluate(tiny_sparse, teacher=tiny_model, settings=av.Evaluation(images=0, held_out=6, plans=["all"]))


def test_every_choice_is_counted_once(report: QualityReport, tiny_sparse: Model) -> None:
    assert [(each.block, each.scale) for each in report.routing] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    for each in report.routing:
        rows = 2 * 6  # with the class and without
        assert each.tokens == rows * (9 if each.scale == 2 else 8), "the gate computes half of the last scale"
        assert len(each.load) == 6 and sum(each.load) == pytest.approx(2)
        assert each.active == 2
        assert 0 < each.balance <= 1
    assert not report.plans["all"].routing
    assert all(not ffn._forward_pre_hooks for ffn in expert_ffns(tiny_sparse.transformer))
    assert QualityReport.model_validate_json(report.to_json()) == report


def test_balance_is_the_entropy_of_the_load(tiny_sparse: Model) -> None:
    watch = RoutingWatch()
    watch.add(0, 2, torch.eye(4, dtype=torch.bool))
    watch.add(1, 2, torch.tensor([[True, False, False, False]] * 3))
    watch.add(1, 3, torch.tensor([[True, True, False, False]] * 3))
    even, one, two = watch.loads(tiny_sparse)
    assert (even.balance, one.balance, two.balance) == pytest.approx((1, 0, 0.5))
    assert even.load == (0.25,) * 4 and one.load == (1, 0, 0, 0) and two.active == 2


def test_a_dense_model_routes_nothing(tiny_model: Model) -> None:
    with watched_routing(tiny_model) as watch:
        tiny_model.generate_tokens([0], seed=0)
    assert watch.loads(tiny_model) == ()


def test_loads_are_shown(report: QualityReport, tiny_sparse: Model) -> None:
    table = printed(*quality_tables(report))
    assert "routed experts" in table and "2, 3" in table and "2.00" in table
    page = report_html(Reports(av.report_flops(tiny_sparse), report))
    assert "Balance of the routers" in page and "2 of 6" in page and "nothing is routed" in page
    silent = report.model_copy(update={"routing": ()})
    assert "routed experts" not in printed(*quality_tables(silent))
    assert "Balance of the routers" not in report_html(Reports(av.report_flops(tiny_sparse), silent))
