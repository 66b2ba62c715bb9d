"""Thresholds that meet a plan's numbers of experts on average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import actvar_convert as av
from actvar_convert.conversion.activations import calibration_labels
from actvar_convert.conversion.thresholds import RETUNED_ON, retuned_plans, threshold_for
from actvar_convert.measure.routing import experts_per_token, watched_routing
from actvar_convert.models.experts import select_experts
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import BudgetRecipe, CalibrationRecipe, ExpertsRecipe, GateRecipe, Recipe


@pytest.mark.parametrize("routed", [2, 3, 6])
def test_a_threshold_runs_the_wanted_number_on_average(routed: int) -> None:
    score = torch.rand(500, 7, generator=torch.Generator().manual_seed(0)) + 0.05
    tau, mean = threshold_for(score, routed)
    chosen = select_experts(score, 0, tau)
    assert 0 < tau < 1 and mean == pytest.approx(routed, abs=0.01)
    assert float(chosen.sum(-1).float().mean()) == pytest.approx(mean)
    assert 1 <= int(chosen.sum(-1).min()) < routed + 1 < 1 + int(chosen.sum(-1).max()), "tokens differ"


def test_one_expert_is_the_best_one() -> None:
    score = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    assert threshold_for(score, 1) == (0.0, 1.0)


def test_scores_below_zero_never_run() -> None:
    score = torch.tensor([[1.0, 0.5, -0.5, -1.0], [2.0, -0.1, -0.2, -0.3]])
    tau, mean = threshold_for(score, 3)
    assert tau == 1.0 and mean == 1.5


def recipe(**experts: object) -> Recipe:
    return Recipe(
        name="tiny",
        model="tiny",
        experts=ExpertsRecipe(count=8, **experts),
        calibration=CalibrationRecipe(pyramids=32, batch=8),
        budget=BudgetRecipe(
            reduction=0.25, search="uniform", plans={"light": 0.15}, prefix_share=0.0, gate_keep=0.75, gate_blocks=(1,)
        ),
        gate=GateRecipe(rank=4),
    )


@pytest.mark.parametrize("neighbourhood", [1, 2])
def test_a_conversion_states_its_thresholds(tiny_model: VARModel, tmp_path: Path, neighbourhood: int) -> None:
    fixed = av.convert(tiny_model, recipe=recipe(neighbourhood=neighbourhood))
    chosen = recipe(neighbourhood=neighbourhood, selection="threshold")
    made = av.convert(tiny_model, recipe=chosen, out=tmp_path / "made")
    assert made.plans.keys() == fixed.plans.keys() and len(made.plans) == 2
    routed = 0
    for name, plan in made.plans.items():
        for index, (block, before) in enumerate(zip(plan.blocks, fixed.plans[name].blocks, strict=True)):
            assert (block.prefix, block.routed, block.keep) == (before.prefix, before.routed, before.keep)
            for scale in range(4):
                if fixed.plans[name].routes(index, scale):
                    routed += 1
                    assert block.threshold is not None
                    assert before.routed[scale] > 1 and 0 < (block.threshold[scale] or 0) <= 1
                    assert block.routed_cost(scale) == pytest.approx(before.routed[scale], abs=0.3)
                else:
                    assert block.threshold is None or block.threshold[scale] is None
    assert routed >= 4
    loaded = av.load(tmp_path / "made", device="cpu")
    assert loaded.plans == made.plans
    labels = torch.tensor([0, 1, 2])
    inputs = tiny_model.teacher_forcing_input(tiny_model.generate_tokens(labels, seed=3))
    with torch.no_grad():
        logits = [model.transformer(labels, inputs) for model in (fixed, made, loaded)]
    assert torch.equal(logits[1], logits[2]) and not torch.allclose(logits[0], logits[1], atol=1e-3)
    assert torch.equal(made.generate_tokens(labels, seed=4), loaded.generate_tokens(labels, seed=4))
    costs = [av.report_flops(model).sparse for model in (fixed, made)]
    assert costs[0] and costs[1] and costs[1].transformer.flops == pytest.approx(costs[0].transformer.flops, rel=0.02)


@pytest.fixture
def drifted(tiny_model: VARModel) -> SparseVARModel:
    """A conversion with thresholds whose routers have moved since."""
    made = av.convert(tiny_model, recipe=recipe(selection="threshold"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in made.transformer.sparse_layers:
            assert layer.ffn.router is not None
            layer.ffn.router.linear.bias += torch.rand(layer.ffn.router.linear.bias.shape, generator=generator)
    return made


def pyramids(model: VARModel, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % model.transformer.config.classes
    return model.generate_tokens(labels, seed=3), labels


def test_thresholds_meet_their_number_again(drifted: SparseVARModel, tiny_model: VARModel) -> None:
    tokens, labels = pyramids(tiny_model)
    before = drifted.plans
    plans = retuned_plans(drifted, tokens, labels, {}, batch=12)
    assert drifted.plans == before and drifted.plan_name == "default"
    assert all("select" not in layer.ffn.__dict__ for layer in drifted.transformer.sparse_layers)
    assert plans.keys() == before.keys() and plans != before
    drifted.transformer.replace_plans(plans)
    inputs = tiny_model.teacher_forcing_input(tokens)
    for name, plan in plans.items():
        drifted.use_plan(name)
        with watched_routing(drifted) as watch, torch.no_grad():
            drifted.transformer(calibration_labels(labels, tiny_model.transformer.null_class), inputs)
        loads = watch.loads(drifted)
        assert loads
        for each in loads:
            block = plan.blocks[each.block]
            assert each.active == pytest.approx(each.planned), "what was counted is what runs"
            assert each.active <= block.routed[each.scale] + 0.3
    assert any(
        abs(block.routed_cost(scale) - block.routed[scale]) < 0.3 and block.tau(scale) != old.tau(scale)
        for block, old in zip(plans["default"].blocks, before["default"].blocks, strict=True)
        for scale in range(4)
    )


def test_thresholds_are_the_same_whatever_the_batch(drifted: SparseVARModel, tiny_model: VARModel) -> None:
    tokens, labels = pyramids(tiny_model, RETUNED_ON + 8)
    found = [retuned_plans(drifted, tokens, labels, {}, batch=batch) for batch in (1, 24, RETUNED_ON)]
    fewer = retuned_plans(drifted, tokens[:RETUNED_ON], labels[:RETUNED_ON], {}, batch=RETUNED_ON)
    assert found[-1] == fewer != retuned_plans(drifted, tokens[:1], labels[:1], {}, batch=1)
    blocks = [[block for plan in plans.values() for block in plan.blocks] for plans in found]
    for each in zip(*blocks, strict=True):
        for scale in range(4):
            assert len({block.tau(scale) is None for block in each}) == 1
            taus, means = zip(*((block.tau(scale) or 0.0, block.routed_cost(scale)) for block in each), strict=True)
            assert taus == pytest.approx([taus[-1]] * 3, abs=0.01) and means == pytest.approx([means[-1]] * 3, abs=0.02)


@pytest.mark.parametrize("batch", [1, 32])
def test_a_conversion_with_small_batches_runs_what_it_states(tiny_model: VARModel, batch: int) -> None:
    changes = {
        "calibration": CalibrationRecipe(pyramids=64, batch=batch),
        "budget": BudgetRecipe(reduction=0.25, search="uniform", prefix_share=0.25),
    }
    chosen = recipe(selection="threshold").model_copy(update=changes)
    made = av.convert(tiny_model, recipe=chosen)
    labels = torch.arange(64) % 5
    inputs = tiny_model.teacher_forcing_input(tiny_model.generate_tokens(labels, seed=77))
    with watched_routing(made) as watch, torch.no_grad():
        made.transformer(calibration_labels(labels, tiny_model.transformer.null_class), inputs)
    active, planned = experts_per_token(watch.loads(made))
    assert active == pytest.approx(planned, rel=0.05)


def test_thresholds_chosen_by_hand_stay(drifted: SparseVARModel, tiny_model: VARModel) -> None:
    tokens, labels = pyramids(tiny_model)
    plans = retuned_plans(drifted, tokens, labels, {"default": drifted.plans["default"]}, batch=5)
    assert plans["default"] == drifted.plans["default"] and plans["light"] != drifted.plans["light"]


def test_a_distillation_ends_with_thresholds_that_fit_it(tiny_model: VARModel, tmp_path: Path) -> None:
    settings = ["distill.stage1.steps=2", "distill.stage2.steps=2", "data.pyramids=16", "data.batch=8"]
    batches = ["distill.stage1.batch=4", "distill.stage2.batch=4", "distill.stage1.learning_rate=0.1"]
    chosen = load_recipe(recipe(selection="threshold"), [*settings, *batches])
    made = av.convert(tiny_model, recipe=chosen, out=tmp_path / "made")
    before = made.plans
    after = av.distill(made, teacher=tiny_model, recipe=chosen, out=tmp_path / "out")
    assert after.plans != before and av.load(tmp_path / "out", device="cpu").plans == after.plans
    again = av.load(tmp_path / "made", device="cpu")
    assert isinstance(again, SparseVARModel) and again.plans == before
    av.distill(again, teacher=tiny_model, recipe=chosen, out=tmp_path / "out")
    assert again.plans == after.plans, "what is finished is taken from its folder"
    state = after.transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.transformer.state_dict().items())
