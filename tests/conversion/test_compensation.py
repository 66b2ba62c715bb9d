"""Output weights refitted for experts that rest: against the plain least-squares problem, and what it is good for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.conversion.compensation import RIDGE, compensate
from actvar_convert.conversion.experts import calibrate_inactive, install_experts, partition_neurons, start_router
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.model import VARModel
from actvar_convert.models.var import FFN, Span
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import ExpertsRecipe

EXPERTS = 8


def inputs_of(model: VARModel, seed: int, mean: float = 0.0) -> list[Tensor]:
    """Correlated FFN inputs, whole maps, one tensor per scale, around a point that lies that far out per channel."""
    config = model.transformer.config
    mix = torch.randn(12, config.width, generator=torch.Generator().manual_seed(1)) / 3
    generator = torch.Generator().manual_seed(seed)
    centre = mean * torch.randn(config.width, generator=torch.Generator().manual_seed(2))
    return [torch.randn(40 * length, 12, generator=generator) @ mix + centre for length in config.pyramid.lengths]


def converted(
    model: VARModel, routed: int, *, inactive: str = "skipped_mean", mean: float = 0.0
) -> tuple[FFN, ExpertFFN, list[Tensor]]:
    """The FFN of block 0 without refitted weights: all experts at the first scale, then fewer and fewer."""
    config = model.transformer.config
    block = BlockPlan(prefix=(8, 5, 3, 2), routed=(0, routed, routed, routed), keep=(1, 1, 1, 1))
    plan = SparsityPlan(experts=EXPERTS, blocks=(block,) * config.depth)
    dense = model.transformer.layers[0].ffn
    assert isinstance(dense, FFN)
    sparse, inputs = ExpertFFN(config, {"plan": plan}, "plan", 0), inputs_of(model, 0, mean)
    with torch.no_grad():
        install_experts(sparse, dense, partition_neurons(dense, torch.cat(inputs), ExpertsRecipe(count=EXPERTS), 2, 0))
        start_router(sparse, torch.cat(inputs[1:]))
        calibrate_inactive(sparse, inputs, inactive)
    return dense, sparse, inputs


@torch.no_grad()
def errors(dense: FFN, sparse: ExpertFFN, inputs: list[Tensor]) -> list[Tensor]:
    """What the sparse FFN says less what the dense one does, per scale [T, C]."""
    found = []
    for scale, x in enumerate(inputs):
        length = sparse.config.pyramid.lengths[scale]
        maps, span = x.view(-1, length, x.shape[1]), Span(scale, (length,))
        found.append((sparse(maps, span) - dense(maps, span)).flatten(0, 1))
    return found


@pytest.mark.parametrize("routed", [0, 2])
@torch.no_grad()
def test_it_solves_the_least_squares_problem(tiny_model: VARModel, routed: int) -> None:
    """The normal equations, set up here for all scales at once from masks, weights and centred columns."""
    _, sparse, inputs = converted(tiny_model, routed)
    rows, targets, lengths = [], [], sparse.config.pyramid.lengths
    for scale, x in enumerate(inputs):
        maps, prefix = x.view(-1, lengths[scale], x.shape[1]), sparse.plan.blocks[0].prefix[scale]
        runs = torch.ones(len(x), EXPERTS, dtype=torch.bool)
        if scale:
            runs[:, prefix:] = sparse.route(maps, scale).flatten(0, 1)
        hidden = F.gelu(sparse.fc1(x), approximate="tanh")
        active = hidden * runs.repeat_interleave(hidden.shape[1] // EXPERTS, dim=1)
        lost = (hidden - active) @ sparse.fc2.weight.T - (~runs).float() @ sparse.inactive[scale]
        root = (lengths[scale] / len(x)) ** 0.5
        centre = float(scale > 0)  # at the first scale nothing rests whose constant could take up a mean
        rows.append(root * (active - centre * active.mean(0)))
        targets.append(root * (lost - centre * lost.mean(0)))
    design, wanted = torch.cat(rows).double(), torch.cat(targets).double()
    pull = RIDGE * design.square().sum(0).mean()
    expected = torch.linalg.solve(design.T @ design + pull * torch.eye(design.shape[1]), design.T @ wanted)
    before = sparse.fc2.weight.clone()
    compensate(sparse, inputs)
    torch.testing.assert_close((sparse.fc2.weight - before).T.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("routed", [0, 2])
def test_the_error_falls_on_tokens_that_it_has_not_seen(tiny_model: VARModel, routed: int) -> None:
    dense, sparse, inputs = converted(tiny_model, routed)
    fresh = inputs_of(tiny_model, 7)
    before = [float(error.square().sum(1).mean()) for error in errors(dense, sparse, fresh)]
    compensate(sparse, inputs)
    after = [float(error.square().sum(1).mean()) for error in errors(dense, sparse, fresh)]
    lengths = sparse.config.pyramid.lengths

    def total(values: list[float]) -> float:
        return sum(length * value for length, value in zip(lengths, values, strict=True))

    assert total(after) < 0.7 * total(before)
    assert before[0] < 1e-9 and after[3] < before[3]


def test_nothing_is_lost_on_average(tiny_model: VARModel) -> None:
    dense, sparse, inputs = converted(tiny_model, 2)
    compensate(sparse, inputs)
    for error in errors(dense, sparse, inputs)[1:]:
        assert float(error.mean(0).abs().max()) < 1e-4


def test_without_constants_none_appear(tiny_model: VARModel) -> None:
    dense, sparse, inputs = converted(tiny_model, 0, inactive="none")
    before = sum(float(error.square().sum()) for error in errors(dense, sparse, inputs))
    compensate(sparse, inputs, centred=False)
    assert not sparse.inactive.any()
    assert sum(float(error.square().sum()) for error in errors(dense, sparse, inputs)) < before


def test_a_dense_plan_keeps_its_weights(tiny_model: VARModel) -> None:
    _, sparse, inputs = converted(tiny_model, 0)
    sparse.plan = SparsityPlan.dense(sparse.config, EXPERTS)
    sparse.plans = {"plan": sparse.plan}
    before = sparse.fc2.weight.clone()
    compensate(sparse, inputs)
    assert torch.equal(sparse.fc2.weight, before)


@torch.no_grad()
def test_scales_that_run_every_expert_keep_their_mean(tiny_model: VARModel) -> None:
    """No constant acts there, so what moves the mean of the output is an error in full."""
    dense, sparse, inputs = converted(tiny_model, 2, mean=1.0)
    compensate(sparse, inputs)
    error = errors(dense, sparse, inputs)[0]
    assert float(error.mean(0).square().sum()) < 0.1 * float(error.square().sum(1).mean())


@torch.no_grad()
def test_a_second_plan_is_not_worse_for_it(tiny_model: VARModel) -> None:
    """Constants are shared by all plans, and shifted for the one in force alone."""
    config = tiny_model.transformer.config
    few, many = (
        SparsityPlan(
            experts=EXPERTS,
            blocks=(BlockPlan(prefix=(8, 8, prefix, prefix), routed=(0, 0, 1, 1), keep=(1,) * 4),) * config.depth,
        )
        for prefix in (1, 5)
    )
    dense, inputs = tiny_model.transformer.layers[0].ffn, inputs_of(tiny_model, 0, mean=1.0)
    assert isinstance(dense, FFN)
    sparse = ExpertFFN(config, {"few": few, "many": many}, "few", 0)
    install_experts(sparse, dense, partition_neurons(dense, torch.cat(inputs), ExpertsRecipe(count=EXPERTS), 2, 0))
    start_router(sparse, torch.cat(inputs[2:]))
    calibrate_inactive(sparse, inputs, "skipped_mean")

    def total(plan: SparsityPlan) -> float:
        sparse.plan = plan
        return sum(float(error.square().sum()) for error in errors(dense, sparse, inputs)[2:])

    before = total(few), total(many)
    sparse.plan = few
    compensate(sparse, inputs)
    assert total(few) < 0.5 * before[0] and total(many) < before[1]
