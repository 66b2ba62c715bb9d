"""What a step moves, and which losses it adds up."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import actvar_convert as av
from actvar_convert.distillation import losses, stages
from actvar_convert.distillation.loop import StageRun
from actvar_convert.distillation.stages import STAGES
from actvar_convert.models.model import Model
from actvar_convert.models.var.labels import Labels
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import JointStage, Recipe, StageRecipe

LABELS = Labels.of(torch.tensor([0, 3, 5, 1]), 5)


@pytest.fixture
def tokens(tiny_model: Model) -> torch.Tensor:
    return tiny_model.generate_tokens(LABELS, seed=3).clone()


def test_a_step_leaves_what_its_plan_does_not_use(tiny_model: Model, tiny_sparse: Model, tokens: torch.Tensor) -> None:
    run = StageRun(tiny_sparse, STAGES["stage2"], JointStage(warmup=1, steps=9), seed=0, turns="random")
    sparse = {name for name in run.parameters if {"gate", "reconstruction"} & {*name.split(".")}}
    assert len(sparse) == 2 * 5

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


def test_which_plans_a_stage_trains(tiny_sparse: Model) -> None:
    tiny_sparse.use_plan("all")
    assert STAGES["stage1"].plans(tiny_sparse, "default") == ["all"]
    assert STAGES["stage1"].plans(tiny_sparse, "random") == ["default"]
    assert STAGES["stage2"].plans(tiny_sparse, "random") == ["default", "all"]


def test_the_losses_of_both_stages_and_what_they_weigh(
    tiny_model: Model, tiny_sparse: Model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (tiny_sparse, tiny_model)
    with torch.no_grad():
        inputs = tiny_model.teacher_forcing_input(tokens)
        local = STAGES["stage1"].objective(*given, StageRecipe(), tokens, LABELS)
        joint = STAGES["stage2"].objective(*given, JointStage(), tokens, LABELS)
        frozen = STAGES["stage2"].objective(*given, JointStage(gate="frozen"), tokens, LABELS)
        for name, (_, loss) in stages.JOINT.items():
            monkeypatch.setitem(stages.JOINT, name, (1.0, loss))
        whole = STAGES["stage2"].objective(*given, JointStage(), tokens, LABELS)
        expected = losses.kl(
            tiny_model.alphabet, tiny_model.transformer(LABELS, inputs), tiny_sparse.transformer(LABELS, inputs)
        )
    assert local.keys() == {"output", "router"} and joint.keys() == {"kl", "hidden", "gate"}
    assert frozen.keys() == {"kl", "hidden"}
    torch.testing.assert_close(joint["kl"], expected)
    torch.testing.assert_close(joint["hidden"], 0.1 * whole["hidden"])
    torch.testing.assert_close(joint["gate"], 0.1 * whole["gate"])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_gate_learns_only_where_tokens_are_skipped(tiny_model: Model, rows: int) -> None:
    """One token is kept whatever the share."""
    chosen = Recipe.model_validate(
        {
            "name": "tiny",
            "model": "tiny",
            "experts": {"count": 8},
            "gate": {"rank": 4},
            "calibration": {"pyramids": 24, "batch": 8},
            "budget": {"gate_keep": 0.6, "gate_scales": 4},
        }
    )
    labels = torch.tensor([0, 0, 3, 5])
    tokens = tiny_model.generate_tokens(labels[:rows].clamp_max(4), seed=3).clone()
    student = av.convert(tiny_model, recipe=chosen)
    found = STAGES["stage2"].objective(student, tiny_model, JointStage(), tokens, Labels.of(labels[:rows], 5))
    assert 0 < float(found["gate"]) < 10


@pytest.mark.parametrize("keep", [(0.5, 1.0, 1.0, 0.99), (1.0, 0.0, 1.0, 0.0)], ids=["all tokens", "all or none"])
def test_a_gate_that_never_chooses_is_left_at_its_start(tiny_model: Model, keep: tuple[float, ...]) -> None:
    config = tiny_model.config
    block = BlockPlan(prefix=(8, 8, 4, 4), routed=(0,) * 4, keep=keep)
    plans = {"one": SparsityPlan(experts=8, blocks=(block,) * config.depth, reconstruction_rank=4)}
    calibration = {"pyramids": 8, "batch": 8}
    chosen = {"name": "tiny", "model": "tiny", "experts": {"count": 8}, "calibration": calibration, "plans": plans}
    student = av.convert(tiny_model, recipe=Recipe.model_validate(chosen))
    tokens = tiny_model.generate_tokens([0, 1], seed=3).clone()
    assert "gate" not in STAGES["stage2"].objective(student, tiny_model, JointStage(), tokens, LABELS.rows(slice(2)))
