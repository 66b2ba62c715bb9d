"""What a step moves, and what it measures on a part of a pyramid."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import actvar_convert as av
from actvar_convert.distillation.loop import StageRun
from actvar_convert.distillation.losses import kl_per_token
from actvar_convert.distillation.stages import STAGES
from actvar_convert.distillation.traces import trace
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import JointStage, Recipe, RouterStage

LABELS = torch.tensor([0, 3, 5, 1])


@pytest.fixture
def tokens(tiny_model: VARModel) -> torch.Tensor:
    return tiny_model.generate_tokens(LABELS, seed=3).clone()


def test_a_step_leaves_what_its_plan_does_not_use(
    tiny_model: VARModel, tiny_sparse: SparseVARModel, tokens: torch.Tensor
) -> None:
    chosen = JointStage(plans="random", router="regress", router_loss=1.0, weight_decay=0.1, warmup=1, steps=9)
    run = StageRun(tiny_sparse, STAGES["stage2"], chosen, seed=0)
    sparse = {name for name in run.parameters if {"gate", "reconstruction", "router", "inactive"} & {*name.split(".")}}
    assert len(sparse) == 2 * 8

    def step(plan: str) -> set[str]:
        """Names of the parameters that move, or whose averages in the optimiser do."""
        tiny_sparse.use_plan(plan)
        before = {name: tensor.clone() for name, tensor in run.tensors().items()}
        run.train_step(tiny_model, tokens, LABELS, nullcontext())
        same = {name for name, tensor in run.tensors().items() if name in before and torch.equal(tensor, before[name])}
        changed = run.tensors().keys() - same
        return {parameter for parameter in run.parameters if any(f"/{parameter}" in name for name in changed)}

    assert sparse <= step("default")
    assert step("all") == run.parameters.keys() - sparse
    assert sparse <= step("default")


def test_which_plans_a_stage_trains(tiny_sparse: SparseVARModel) -> None:
    tiny_sparse.use_plan("all")
    assert STAGES["stage1"].plans(tiny_sparse, RouterStage()) == ["all"]
    assert STAGES["stage1"].plans(tiny_sparse, RouterStage(plans="random")) == ["default"]
    assert STAGES["stage2"].plans(tiny_sparse, JointStage(plans="random")) == ["default", "all"]
    assert STAGES["stage1"].sparse_scales(tiny_sparse.plans["default"]) == [2, 3]
    assert STAGES["stage2"].sparse_scales(tiny_sparse.plan) == []


@pytest.mark.parametrize("student", [False, True])
def test_the_states_of_a_prefix_are_those_of_the_whole(
    tiny_model: VARModel, tiny_sparse: SparseVARModel, tokens: torch.Tensor, student: bool
) -> None:
    model, ends = tiny_sparse if student else tiny_model, tiny_model.transformer.config.pyramid.ends
    with torch.no_grad():
        whole = trace(model.transformer, LABELS, tiny_model.teacher_forcing_input(tokens), ffn=not student)
        part = trace(model.transformer, LABELS, tiny_model.teacher_forcing_input(tokens[:, : ends[1]]), ffn=not student)
    assert (whole.scales, part.scales) == (4, 3) and part.logits is not None and whole.logits is not None
    torch.testing.assert_close(part.logits, whole.logits[:, : ends[2]])
    torch.testing.assert_close(part.hidden, [state[:, : ends[2]] for state in whole.hidden])
    torch.testing.assert_close(part.ffn_input, [state[:, : ends[2]] for state in whole.ffn_input])
    with pytest.raises(ValueError, match="3 tokens are no whole number of scales"):
        tiny_model.teacher_forcing_input(tokens[:, :3])


def test_losses_of_a_prefix_by_the_weights_of_its_scales(
    tiny_model: VARModel, tiny_sparse: SparseVARModel, tokens: torch.Tensor
) -> None:
    ends, weights = tiny_model.transformer.config.pyramid.ends, (0.0, 1.0, 3.0, 5.0)
    chosen = JointStage(scale_weights=weights, router="regress", router_loss=1.0)
    with torch.no_grad():
        inputs = tiny_model.teacher_forcing_input(tokens)
        kl = kl_per_token(tiny_model.transformer(LABELS, inputs), tiny_sparse.transformer(LABELS, inputs)).mean(0)
        losses = STAGES["stage2"].objective(tiny_sparse, tiny_model, chosen, tokens[:, : ends[1]], LABELS)
        local = STAGES["stage1"].objective(
            tiny_sparse, tiny_model, RouterStage(scale_weights=weights), tokens[:, : ends[1]], LABELS
        )
    expected = (kl[ends[0] : ends[1]].sum() + 3 * kl[ends[1] : ends[2]].sum()) / (4 + 3 * 9)
    torch.testing.assert_close(losses["kl"], expected)
    assert losses.keys() == {"kl", "hidden", "router"}, "the gate of the last scale is not in hand"
    assert local.keys() == {"output", "router"} and local["output"] > 0
    nothing = JointStage(scale_weights=(0, 0, 0, 1))
    assert STAGES["stage2"].objective(tiny_sparse, tiny_model, nothing, tokens[:, :1], LABELS)["kl"] == 0


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_gate_learns_only_where_tokens_are_skipped(tiny_model: VARModel, rows: int) -> None:
    """One token is kept whatever the share."""
    chosen = Recipe.model_validate(
        {
            "name": "tiny",
            "model": "tiny",
            "experts": {"count": 8},
            "gate": {"rank": 4},
            "calibration": {"pyramids": 24, "batch": 8},
            "budget": {"search": "uniform", "gate_keep": 0.6, "gate_scales": 4, "gate_blocks": [0, 1]},
        }
    )
    labels = torch.tensor([0, 0, 3, 5])
    tokens = tiny_model.generate_tokens(labels[:rows].clamp_max(4), seed=3).clone()
    student = av.convert(tiny_model, recipe=chosen)
    losses = STAGES["stage2"].objective(student, tiny_model, JointStage(), tokens, labels[:rows])
    assert 0 < float(losses["gate"]) < 10


def test_a_gate_that_never_skips_is_left_at_its_start(tiny_model: VARModel) -> None:
    config = tiny_model.transformer.config
    block = BlockPlan(prefix=(8, 8, 4, 4), routed=(0,) * 4, keep=(0.5, 1.0, 1.0, 0.99))
    plans = {"one": SparsityPlan(experts=8, blocks=(block,) * config.depth, reconstruction_rank=4)}
    calibration = {"pyramids": 8, "batch": 8}
    chosen = {"name": "tiny", "model": "tiny", "experts": {"count": 8}, "calibration": calibration, "plans": plans}
    student = av.convert(tiny_model, recipe=Recipe.model_validate(chosen))
    tokens = tiny_model.generate_tokens([0, 1], seed=3).clone()
    assert "gate" not in STAGES["stage2"].objective(student, tiny_model, JointStage(), tokens, LABELS[:2])
