"""The training loop: it learns, resumes to the bit, and refuses a state that is not its own."""

import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from actvar_convert.conversion import converter
from actvar_convert.conversion.budget import uniform_plan
from actvar_convert.distillation import loop
from actvar_convert.distillation.data import TokenStore
from actvar_convert.distillation.loop import Upkeep, distill_model
from actvar_convert.errors import CheckpointError, Diverged, Interrupted
from actvar_convert.files.run_state import RunState, load_run_state
from actvar_convert.models.model import Model
from actvar_convert.models.split import expert_ffns
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import (
    BudgetRecipe,
    CalibrationRecipe,
    DistillRecipe,
    ExpertsRecipe,
    GateRecipe,
    JointStage,
    Recipe,
    StageRecipe,
)
from actvar_convert.system.processes import Processes
from actvar_convert.system.progress import MetricsLog, SilentProgress

from ..conftest import convert_with, gated_plan


def recipe(
    stage1: dict[str, object] | None = None, stage2: dict[str, object] | None = None, plans: str = "default"
) -> Recipe:
    short: dict[str, object] = {"steps": 6, "batch": 8, "warmup": 2, "learning_rate": 2e-3}
    return Recipe(
        name="tiny",
        model="tiny",
        experts=ExpertsRecipe(count=8),
        calibration=CalibrationRecipe(pyramids=24, batch=8),
        budget=BudgetRecipe(reduction=0.25, gate_keep=0.6),
        gate=GateRecipe(rank=4),
        distill=DistillRecipe(
            plans=plans,
            stage1=StageRecipe(**(short | (stage1 or {}))),
            stage2=JointStage(**(short | (stage2 or {}))),
        ),
    )


@pytest.fixture
def store(tiny_model: Model) -> TokenStore:
    labels = torch.arange(24) % 5
    return TokenStore(tiny_model, tiny_model.generate_tokens(labels, seed=1), labels)


def converted(teacher: Model, chosen: Recipe, store: TokenStore) -> Model:
    """The student; if plans are trained by turns it has a second one, that saves less and gates nothing."""
    plans = {"plan": gated_plan(uniform_plan(teacher.config, chosen))}
    if chosen.distill.plans == "random":
        block = BlockPlan(prefix=(8, 8, 8, 2), routed=(0, 0, 0, 2), keep=(1.0,) * 4)
        plans["gentle"] = SparsityPlan(experts=8, blocks=(block,) * 2)
    return convert_with(teacher, plans, "plan", chosen, store.tokens.long(), store.condition.values)


def train(
    teacher: Model, chosen: Recipe, store: TokenStore, folder: Path, fingerprint: str = "run"
) -> tuple[Model, list[dict[str, object]]]:
    model = converted(teacher, chosen, store)
    with MetricsLog(folder / "metrics.jsonl") as log:
        distill_model(
            model,
            teacher,
            chosen,
            store,
            Upkeep(SilentProgress(), log, folder / "state.safetensors", fingerprint),
        )
        return model, log.read()


def kl_to(teacher: Model, model: Model, store: TokenStore) -> float:
    inputs = teacher.teacher_forcing_input(store.tokens)
    with torch.no_grad():
        logits = [each.transformer(store.condition, inputs) for each in (teacher, model)]
        return float(teacher.alphabet.divergence(*logits).mean())


def test_both_stages_lower_their_losses(
    tiny_model: Model, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe({"steps": 30}, {"steps": 40})
    # routers would start at the solution; at zero they have something to learn
    monkeypatch.setattr(converter, "start_router", lambda ffn, inputs: None)
    before = kl_to(tiny_model, converted(tiny_model, chosen, store), store)
    teacher = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    model, lines = train(tiny_model, chosen, store, tmp_path)
    first = [line for line in lines if line["stage"] == "stage1"]
    second = [line for line in lines if line["stage"] == "stage2"]
    assert len(first) == 30 and len(second) == 40
    assert {"output", "router"} <= first[0].keys() and {"kl", "hidden", "gate"} <= second[0].keys()
    assert "plan" not in second[0]
    assert first[-1]["output"] < first[0]["output"] and first[-1]["router"] < first[0]["router"]
    assert kl_to(tiny_model, model, store) < 0.6 * before
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in tiny_model.state_dict().items())


@pytest.mark.parametrize("trainable", ["none", "lora", "experts", "all"])
def test_only_the_chosen_weights_move(tiny_model: Model, store: TokenStore, tmp_path: Path, trainable: str) -> None:
    chosen = recipe({"steps": 0}, {"trainable": trainable, "steps": 3})
    before = converted(tiny_model, chosen, store).transformer.state_dict()
    model, _ = train(tiny_model, chosen, store, tmp_path)
    after = model.transformer.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    groups = {
        "router": any("router" in name for name in moved),
        "gate": any(".gate." in name for name in moved),
        "reconstruction": any(".reconstruction." in name for name in moved),
        "ffn": any(".fc1.weight" in name for name in moved),
        "attention": any("mat_qkv" in name for name in moved),
        "head": any(name.startswith("head.") for name in moved),
    }
    assert groups == {
        "router": False,
        "gate": True,
        "reconstruction": True,
        "ffn": trainable != "none",
        "attention": trainable in ("lora", "all"),
        "head": trainable == "all",
    }


def test_the_first_stage_moves_routers_and_experts_alone(tiny_model: Model, store: TokenStore, tmp_path: Path) -> None:
    chosen = recipe({}, {"steps": 0})
    before = converted(tiny_model, chosen, store).transformer.state_dict()
    after = train(tiny_model, chosen, store, tmp_path)[0].transformer.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".ffn." in name for name in moved)
    assert any("router" in name for name in moved) and any(".fc1." in name for name in moved)


def test_frozen_gates_and_reconstructions_stay_still(tiny_model: Model, store: TokenStore, tmp_path: Path) -> None:
    chosen = recipe({"steps": 0}, {"gate": "frozen"})
    before = converted(tiny_model, chosen, store).transformer.state_dict()
    model, lines = train(tiny_model, chosen, store, tmp_path)
    after = model.transformer.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still >= {name for name in before if {"gate", "reconstruction"} & {*name.split(".")}} != set()
    assert "blocks.0.attn.mat_qkv.weight" not in still and all("gate" not in line for line in lines)


def test_one_checkpoint_is_trained_for_all_of_its_plans(tiny_model: Model, store: TokenStore, tmp_path: Path) -> None:
    chosen = recipe({"steps": 30}, {"steps": 40}, plans="random")
    untrained = converted(tiny_model, chosen, store)
    model, lines = train(tiny_model, chosen, store, tmp_path)
    assert model.plans.name == "plan" and all(ffn.plans is model.plans for ffn in expert_ffns(model.transformer))
    for stage, steps in (("stage1", 30), ("stage2", 40)):
        ran = [line["plan"] for line in lines if line["stage"] == stage]
        assert len(ran) == steps and ran.count("plan") == ran.count("gentle") == steps / 2
    assert all(("gate" in line) == (line["plan"] == "plan") for line in lines if line["stage"] == "stage2")
    for plan, share in (("plan", 0.7), ("gentle", 0.85)):
        untrained.use_plan(plan)
        model.use_plan(plan)
        assert kl_to(tiny_model, model, store) < share * kl_to(tiny_model, untrained, store), plan


@pytest.mark.parametrize(
    ("stage2", "plans"),
    [({}, "default"), ({"trainable": "lora"}, "default"), ({"optimizer": "muon"}, "default"), ({}, "random")],
)
@pytest.mark.parametrize("stop_at", [4, 9])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_model: Model,
    store: TokenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage2: dict[str, object],
    plans: str,
    stop_at: int,
) -> None:
    chosen = recipe({}, stage2, plans)
    whole, lines = train(tiny_model, chosen, store, tmp_path / "whole")
    original, taken = loop.StageRun.train_step, 0

    def stopping(self: loop.StageRun, *args: object) -> dict[str, float]:
        nonlocal taken
        taken += 1
        if taken == stop_at:
            signal.raise_signal(signal.SIGTERM if stop_at == 9 else signal.SIGINT)
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.StageRun, "train_step", stopping)
    with pytest.raises(Interrupted, match="all of it is kept"):
        train(tiny_model, chosen, store, tmp_path / "parts")
    monkeypatch.setattr(loop.StageRun, "train_step", original)
    resumed, resumed_lines = train(tiny_model, chosen, store, tmp_path / "parts")
    assert resumed_lines == lines
    expected = whole.transformer.state_dict()
    for name, tensor in resumed.transformer.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_lines_of_later_stages_go_when_an_earlier_one_is_resumed(
    tiny_model: Model, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in stage 2 before its first save leaves lines of steps that the next run takes again."""
    whole, lines = train(tiny_model, recipe(), store, tmp_path / "whole")
    original, taken = loop.StageRun.train_step, 0

    def crashing(self: loop.StageRun, *args: object) -> dict[str, float]:
        nonlocal taken
        taken += 1
        if taken == 9:
            raise OSError("power")
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.StageRun, "train_step", crashing)
    with pytest.raises(OSError, match="power"):
        train(tiny_model, recipe(), store, tmp_path / "parts")
    monkeypatch.setattr(loop.StageRun, "train_step", original)
    resumed, resumed_lines = train(tiny_model, recipe(), store, tmp_path / "parts")
    assert resumed_lines == lines
    expected = whole.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.transformer.state_dict().items())


@pytest.mark.parametrize(("every", "pause", "saved"), [(0.0, 0.0, 12), (0.0, 1e9, 4), (1e9, 0.0, 2)])
def test_a_state_is_saved_by_time_and_at_the_end_of_a_stage(
    tiny_model: Model,
    store: TokenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: float,
    pause: float,
    saved: int,
) -> None:
    """After the first save it is the time that this one took which counts."""
    monkeypatch.setattr(loop, "SAVE_EVERY", every)
    monkeypatch.setattr(loop, "SAVE_PAUSE", pause)
    steps = []

    def noting(path: Path, state: RunState) -> None:
        steps.append((state.scalars["stage"], state.scalars["step"]))

    monkeypatch.setattr(loop, "save_run_state", noting)
    train(tiny_model, recipe(), store, tmp_path)
    assert len(steps) == saved and {("stage1", 6), ("stage2", 6)} <= {*steps}


def test_a_training_that_diverges_stops_and_keeps_what_was_saved(
    tiny_model: Model, store: TokenStore, tmp_path: Path
) -> None:
    wild = recipe({}, {"learning_rate": 1e30, "warmup": 0, "trainable": "all"})
    with pytest.raises(Diverged, match=r"stage2 diverged: .* Lower distill.stage2.learning_rate \(given 1e\+30\)"):
        train(tiny_model, wild, store, tmp_path)
    state = load_run_state(tmp_path / "state.safetensors", "run")
    assert (state.scalars["stage"], state.scalars["step"], state.scalars["skipped"]) == ("stage2", 1, 0)
    assert not any(bool(tensor.isnan().any()) for tensor in state.tensors.values())


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[tuple[str, int]], named: str) -> None:
    """Makes the gradient of one parameter NaN at some steps (of a stage, from 0)."""
    trained, added = loop.StageRun.train_step, Processes.add_gradients
    now: list[loop.StageRun] = []

    def noting(self: loop.StageRun, *args: Any) -> dict[str, float]:
        now[:] = [self]
        return trained(self, *args)

    def spoiling(self: Processes, parameters: Iterable[nn.Parameter]) -> None:
        added(self, parameters)
        if (now[0].stage.name, now[0].step) in steps:
            gradient = now[0].parameters[named].grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.nan

    monkeypatch.setattr(loop.StageRun, "train_step", noting)
    monkeypatch.setattr(Processes, "add_gradients", spoiling)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(
    tiny_model: Model, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {("stage2", 1), ("stage2", 2), ("stage2", 4)}, "blocks.1.block.ffn.fc1.weight")
    whole, lines = train(tiny_model, recipe(), store, tmp_path / "whole")
    assert [line.get("skipped") for line in lines] == [*[None] * 7, 1, 2, None, 3, None]
    assert not any(bool(tensor.isnan().any()) for tensor in whole.transformer.state_dict().values())
    stopping = loop.StageRun.train_step

    def stop(self: loop.StageRun, *args: Any) -> dict[str, float]:
        if (self.stage.name, self.step) == ("stage2", 1):
            signal.raise_signal(signal.SIGINT)
        return stopping(self, *args)

    monkeypatch.setattr(loop.StageRun, "train_step", stop)
    with pytest.raises(Interrupted):
        train(tiny_model, recipe(), store, tmp_path / "parts")
    monkeypatch.setattr(loop.StageRun, "train_step", stopping)
    resumed, again = train(tiny_model, recipe(), store, tmp_path / "parts")
    assert json.dumps(again) == json.dumps(lines)
    expected = whole.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.transformer.state_dict().items())


def test_too_many_skipped_steps_end_the_training_with_the_state_before_them(
    tiny_model: Model, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = "blocks.1.block.ffn.fc1.weight"
    spoil(monkeypatch, {("stage2", step) for step in (2, 3, 4)}, named)
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda self, text: said.append(text))
    with pytest.raises(
        Diverged, match=rf"stage2 diverged: 3 steps in a row .* in {named}\. Step 2, before them, is kept"
    ):
        train(tiny_model, recipe(), store, tmp_path)
    assert said == [f"stage2, step {step}: skipped, not finite in {named}" for step in (3, 4, 5)]
    state = load_run_state(tmp_path / "state.safetensors", "run")
    assert (state.scalars["step"], state.scalars["skipped"], state.scalars["in_a_row"]) == (2, 0, 0)


def test_the_block_whose_output_is_not_finite_is_named(
    tiny_model: Model, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = loop.StageRun.choose

    def broken(self: loop.StageRun) -> dict[str, str]:
        if self.stage.name == "stage2":
            list(expert_ffns(self.model.transformer))[1].fc2.weight.data[0, 0] = torch.inf
        return begun(self)

    monkeypatch.setattr(loop.StageRun, "choose", broken)
    with pytest.raises(Diverged, match=r"in blocks\.1\.ffn\."):
        train(tiny_model, recipe(), store, tmp_path)


def test_a_state_that_began_with_another_model_is_refused(tiny_model: Model, store: TokenStore, tmp_path: Path) -> None:
    train(tiny_model, recipe(), store, tmp_path)
    other = recipe().model_copy(update={"seed": 1})
    with pytest.raises(CheckpointError, match="began with another converted model"):
        train(tiny_model, other, store, tmp_path)


def test_a_state_of_another_run_is_refused(tiny_model: Model, store: TokenStore, tmp_path: Path) -> None:
    train(tiny_model, recipe(), store, tmp_path, "one recipe")
    with pytest.raises(CheckpointError):
        train(tiny_model, recipe(), store, tmp_path, "another recipe")


@pytest.mark.parametrize("left", [0.0, 1e-4], ids=["same scores", "same ranks"])
def test_a_router_that_collapses_and_a_gate_that_saturates_are_said_once(
    tiny_model: Model, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float
) -> None:
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(loop, "LOOK_EVERY", 2)
    train(tiny_model, recipe(), store, tmp_path / "sound")
    assert not said
    begun = loop.StageRun.choose

    def flattened(self: loop.StageRun) -> dict[str, str]:
        if self.stage.name == "stage2":
            for name, module in self.model.transformer.named_modules():
                if name == "blocks.1.gate":
                    module.linear.weight.data.zero_()
                elif name == "blocks.0.ffn.router":
                    module.linear.weight.data.mul_(left)
                    module.linear.bias.data.copy_(torch.arange(len(module.linear.bias)))
        return begun(self)

    monkeypatch.setattr(loop.StageRun, "choose", flattened)
    train(tiny_model, recipe(), store, tmp_path / "flat")
    assert sorted(said) == [
        "stage2, step 1: blocks.0.ffn.router ranks the experts alike for every token",
        "stage2, step 1: blocks.1.gate gives every token the same score",
    ]
