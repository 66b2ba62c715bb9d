"""Weights refitted block after block: each problem against its plain solution, and what the whole is good for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from actvar_convert.conversion.converter import conversion_steps, convert_model
from actvar_convert.conversion.experts import active_neurons
from actvar_convert.conversion.refitting import _GatedMoments, refit_in_order
from actvar_convert.conversion.search import Planned
from actvar_convert.models.base import Span, inner
from actvar_convert.models.model import Model
from actvar_convert.models.split import ffn_of
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import CalibrationRecipe, ExpertsRecipe, GateRecipe, Recipe

from ..conftest import calibration_of, convert_with

EXPERTS = 8
WHOLE = ((EXPERTS,) * 4, (0,) * 4, (1.0,) * 4)
PLANS = {
    "static": ((8, 6, 5, 3), (0, 0, 0, 0), (1.0, 1.0, 1.0, 1.0)),
    "routed": ((8, 5, 3, 2), (0, 1, 2, 2), (1.0, 1.0, 1.0, 1.0)),
    "gated": ((8, 5, 3, 3), (0, 1, 2, 2), (1.0, 1.0, 0.5, 0.4)),
}


@pytest.fixture
def dense(tiny_model: Model) -> Model:
    """The tiny model with three blocks."""
    torch.manual_seed(0)
    transformer = VARTransformer(tiny_model.config.model_copy(update={"depth": 3}))
    transformer.initialise(torch.Generator().manual_seed(0))
    for parameter in transformer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Model(transformer, tiny_model.tokenizer).eval().requires_grad_(False)


def plan(*kinds: str) -> SparsityPlan:
    """A plan whose blocks are each whole or of one kind."""
    made = [BlockPlan(prefix=p, routed=r, keep=k) for p, r, k in (PLANS.get(kind, WHOLE) for kind in kinds)]
    return SparsityPlan(experts=EXPERTS, blocks=tuple(made), reconstruction_rank=4)


def recipe(compensation: str = "none") -> Recipe:
    experts = ExpertsRecipe(count=EXPERTS, compensation=compensation)  # type: ignore[arg-type]
    calibration = CalibrationRecipe(pyramids=120, batch=32)
    return Recipe(name="x", model="x", experts=experts, calibration=calibration, gate=GateRecipe(rank=4))


def pyramids(dense: Model, count: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 5
    return dense.generate_tokens(labels, seed=seed), labels


def convert(dense: Model, chosen: Recipe, **plans: SparsityPlan) -> Model:
    return convert_with(dense, plans, next(iter(plans)), chosen, *pyramids(dense, 120, 1))


@torch.no_grad()
def error(dense: Model, sparse: Model) -> float:
    """Relative error of the logits on pyramids that no fit has seen."""
    tokens, labels = pyramids(dense, 40, 9)
    inputs = dense.teacher_forcing_input(tokens)
    expected = dense.transformer(labels, inputs)
    return float((sparse.transformer(labels, inputs) - expected).norm() / expected.norm())


def test_a_step_solves_the_least_squares_problem_of_every_channel() -> None:
    """Gates that are a product of token and channel, for which one matrix for all channels is exact."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(5, 3)
    z, missing = torch.randn(6, 7, 5, generator=generator), torch.randn(6, 7, 3, generator=generator)
    gate = torch.rand(6, 1, generator=generator) * torch.tensor([0.5, 1.0, -2.0])
    before = torch.cat((layer.weight, layer.bias.unsqueeze(1)), 1).detach().clone()
    moments = _GatedMoments(layer)
    moments.add(z[:4], missing[:4], gate[:4])
    moments.add(z[4:], missing[4:], gate[4:])
    with torch.no_grad():
        moments.move(1e-9)
    step = torch.cat((layer.weight, layer.bias.unsqueeze(1)), 1).detach() - before
    design = torch.cat((z, torch.ones(6, 7, 1)), -1)
    for channel in range(3):
        rows = (design * gate[:, channel].view(6, 1, 1)).flatten(0, 1)
        expected = torch.linalg.lstsq(rows, missing[..., channel].flatten()).solution
        torch.testing.assert_close(step[channel], expected, rtol=1e-3, atol=1e-4)


def test_active_neurons_make_the_output(dense: Model) -> None:
    sparse = convert(dense, recipe(), a=plan(*["routed"] * 3))
    ffn, config = ffn_of(sparse.transformer.blocks[1]), dense.config
    for scale, length in enumerate(config.schedule.lengths):
        x = torch.randn(3, length, config.width, generator=torch.Generator().manual_seed(scale))
        with torch.no_grad():
            hidden, runs = active_neurons(ffn, x, scale)
            made = (hidden * runs.unsqueeze(-1)).flatten(2) @ ffn.fc2.weight.T + ffn.fc2.bias
            torch.testing.assert_close(made, ffn(x, Span(scale, (length,))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(PLANS))
def test_it_comes_closer_than_weights_as_they_were(dense: Model, kind: str) -> None:
    found = {how: error(dense, convert(dense, recipe(how), a=plan(kind, kind, kind))) for how in ("none", "sequential")}
    assert found["sequential"] < found["none"]


def test_every_plan_gains_and_none_is_left_in_force(dense: Model) -> None:
    plans = {"a": plan("gated", "whole", "routed"), "b": plan("static", "static", "static")}
    plain, fitted = convert(dense, recipe(), **plans), convert(dense, recipe("sequential"), **plans)
    assert fitted.plans.name == "a" and fitted.plan == plans["a"]
    for name in plans:
        for model in (plain, fitted):
            model.use_plan(name)
        assert error(dense, fitted) < 0.9 * error(dense, plain)


def test_blocks_before_the_first_sparse_one_stay(dense: Model) -> None:
    plans = {"a": plan("whole", "static", "whole")}
    plain, fitted = convert(dense, recipe(), **plans).state_dict(), convert(dense, recipe("sequential"), **plans)
    moved = {name for name, value in fitted.state_dict().items() if not torch.equal(value, plain[name])}
    layers = ("blocks.1.ffn.fc2", "blocks.2.attn.proj", "blocks.2.ffn.fc2", "head")
    assert moved == {f"transformer.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    hooked = [*dense.transformer.modules(), *fitted.transformer.modules()]
    assert not any(module._forward_hooks for module in hooked)


def test_a_dense_plan_is_left_alone(dense: Model) -> None:
    plans, calls = {"a": plan("whole", "whole", "whole")}, []
    tokens, labels = pyramids(dense, 20, 1)
    sparse = convert_with(dense, plans, "a", recipe(), tokens, labels)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    refit_in_order(dense, sparse, calibration_of(dense, tokens, labels), on_block=lambda: calls.append(1))
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items()) and len(calls) == 3


def test_steps_are_counted(dense: Model) -> None:
    for how, steps in (("none", 3), ("sequential", 6)):
        calls: list[int] = []
        tokens, labels = pyramids(dense, 20, 1)
        chosen, plans = recipe(how), {"a": plan("static", "static", "static")}
        planned = Planned(plans, "a", None, {})
        convert_model(
            dense, planned, chosen, calibration_of(dense, tokens, labels), on_block=lambda calls=calls: calls.append(1)
        )
        assert len(calls) == conversion_steps(dense.config, chosen) == steps


def test_a_block_that_computes_no_token_is_left_as_it_is(dense: Model) -> None:
    none = BlockPlan(prefix=(8, 6, 5, 3), routed=(0,) * 4, keep=(0.0,) * 4)
    chosen = plan("static", "static", "static")
    chosen = chosen.model_copy(update={"blocks": (chosen.blocks[0], none, chosen.blocks[2])})
    sparse = convert(dense, recipe("sequential"), default=chosen)
    before, after = (inner(model.transformer.blocks[1]).attn.proj.weight for model in (dense, sparse))
    assert torch.equal(before, after) and torch.isfinite(ffn_of(sparse.transformer.blocks[2]).fc2.weight).all()
    assert not torch.equal(
        dense.transformer.blocks[2].attn.proj.weight, inner(sparse.transformer.blocks[2]).attn.proj.weight
    )
