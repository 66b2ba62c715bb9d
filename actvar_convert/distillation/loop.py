"""The one training loop: runs the stages in order, keeps metrics and resumable state.

A step depends on the weights, the seed and its own number alone (``schedule``), so a resumed run equals an
uninterrupted one. How many processes share a step changes the order of sums and nothing else.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from actvar_convert.distillation.data import TokenStore
from actvar_convert.distillation.lora import attach_lora, fold_lora
from actvar_convert.distillation.optimizers import Optimizers
from actvar_convert.distillation.schedule import learning_rate, partly_dropped, plan_of_step
from actvar_convert.distillation.sharding import shard_student, split_like, whole, whole_student
from actvar_convert.distillation.stages import STAGES, Stage, lora_rank, trainable_parameters, trains_gates
from actvar_convert.errors import CheckpointError, Diverged, InputError, Interrupted, counted
from actvar_convert.files.run_state import RunState, Scalar, load_run_state, save_run_state
from actvar_convert.models.base import inner
from actvar_convert.models.experts import Router
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.gate import TokenGate
from actvar_convert.models.model import Model
from actvar_convert.models.split import added, gated_blocks, plans_of
from actvar_convert.recipe.check import split_problems
from actvar_convert.recipe.schema import PlanTurns, Recipe, StageRecipe
from actvar_convert.system.device import autocast_dtype
from actvar_convert.system.processes import Processes, local
from actvar_convert.system.progress import MetricsLog, Progress

ECHO = 5.0
"""Seconds within which a launcher passes a signal on."""

GRADIENT_CLIP = 1.0
"""Largest norm of the gradient; a longer one is shortened to it. Routers and gates have a norm of their own: their
regressions are ten times as steep as the losses of the weights, which would be shortened by a factor that jumps."""

SKIPPED_IN_A_ROW = 10
"""Steps without a finite gradient, one after another, that end a training, or half of a stage; fewer are skipped."""

LOOK_EVERY = 25
"""Steps between two looks at what routers and gates say."""

FEWEST_SEEN = 16
"""Tokens of a call below which nothing is said of a router or gate that treats them alike."""

SAVE_EVERY = 30.0
"""Seconds between two saves of the state, at least."""

SAVE_PAUSE = 20
"""The same in units of what the last save took."""


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that is honoured after the step in hand; a second is immediate.

    A launcher repeats to its processes what the terminal has told them already: that is no second one.
    """

    def __init__(self) -> None:
        self.asked = False
        self._echo_until = 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self._echo_until = time.monotonic() + (ECHO if "LOCAL_RANK" in os.environ else 0)
        elif time.monotonic() > self._echo_until:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listens for the signals while the block runs; elsewhere than in the main thread it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StageRun:
    """One stage in progress: parameters, optimiser and the number of steps done.

    Args:
        state: what an earlier run of the stage saved; None: the stage begins.
        processes: those that share the stage.
        turns: plans that the steps train: the active one, or all of the model by turns.
    """

    def __init__(
        self,
        model: Model,
        stage: Stage,
        recipe: StageRecipe,
        seed: int,
        state: RunState | None = None,
        processes: Processes | None = None,
        turns: PlanTurns = "default",
    ) -> None:
        self.model, self.stage, self.recipe, self.seed = model, stage, recipe, seed
        self.processes = processes or Processes(device=model.device)
        self.plans = stage.plans(model, turns)
        self.objective: Callable[..., dict[str, Tensor]] = stage.objective
        self.lora_rank = lora_rank(recipe)
        if self.lora_rank is not None:
            attach_lora(model.transformer, self.lora_rank, seed)
        if state is not None:
            model.transformer.load_state_dict(_below("model/", state.tensors))
        model.transformer.requires_grad_(False)
        for parameter in trainable_parameters(model.transformer, recipe).values():
            parameter.requires_grad_(True)
        if self.processes.shard:
            self.objective = shard_student(model.transformer, stage.objective, self.processes)
        self.parameters = trainable_parameters(model.transformer, recipe)
        role = added(model.transformer)
        self.optimizers = Optimizers(self.parameters, recipe, role)
        scorers = {name for name in self.parameters if role.get(name) in ("router", "gate")}
        self.clipped = {
            "gradient_norm": [own for name, own in self.parameters.items() if name not in scorers],
            "score_norm": [own for name, own in self.parameters.items() if name in scorers],
        }
        for block in gated_blocks(model.transformer):
            block.straight_through = trains_gates(recipe)
        self.step = self.skipped = self.in_a_row = 0
        self.faulty = ""
        if state is not None:
            self._restore(state)

    def train_step(
        self, teacher: Model, tokens: Tensor, condition: Any, autocast: AbstractContextManager[object]
    ) -> dict[str, float]:
        """One optimiser step on this process's rows; returns losses, learning rate and gradient norms of all rows.

        A step whose plan gives nothing to train changes nothing. It counts if other plans take their turns. One whose
        loss or gradient is not finite is skipped, and counts: weights and optimiser stay as they are, ``faulty`` says
        where it came from.
        """
        recipe, processes = self.recipe, self.processes
        rate = learning_rate(recipe, self.step)
        with autocast:
            losses = self.objective(self.model, teacher, recipe, tokens, condition, processes.total)
        shares = torch.stack(list(losses.values())) if losses else None
        if shares is None or not shares.requires_grad:
            if len(self.plans) > 1:
                self.step += 1
            return {"loss": 0.0}
        self.optimizers.zero_grad()
        torch.autograd.backward(shares.sum())
        processes.add_gradients(self.parameters.values())
        norms = {name: float(processes.clip_gradients(own, GRADIENT_CLIP)) for name, own in self.clipped.items() if own}
        totals = processes.total(shares)
        values = dict(zip(losses, totals.tolist(), strict=True))
        loss = float(totals.sum())
        self.step += 1
        if processes.any(not all(map(math.isfinite, (loss, *norms.values()))))[0]:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            with autocast:
                self.faulty = self._origin(values, teacher, tokens, condition)
            self.optimizers.zero_grad()
            return {"loss": loss, **values, "learning_rate": rate, **norms, "skipped": self.skipped}
        self.optimizers.step(rate)
        self.in_a_row = 0
        return {"loss": loss, **values, "learning_rate": rate, **norms}

    def _origin(self, losses: Mapping[str, float], *batch: Any) -> str:
        """Where a step without a finite gradient came from: the first block whose output is not finite, the loss, or
        the last block whose gradient is not finite, for a gradient goes through the blocks backwards."""
        found: list[str] = []

        def look(name: str, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        blocks = {f"blocks.{index}": block for index, block in enumerate(self.model.transformer.blocks)}
        parts = {**{f"{name}.ffn": inner(block).ffn for name, block in blocks.items()}, **blocks}
        with outputs_seen(parts, look), torch.no_grad():
            self.objective(self.model, batch[0], self.recipe, *batch[1:], self.processes.total)
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        if not found and wrong:
            found = [f"the loss {name!r}" for name in wrong]
        if not found:
            sizes = {name: local(p.grad).abs().max() for name, p in self.parameters.items() if p.grad is not None}
            found = [name for name, size in reversed(sizes.items()) if not size.isfinite()]
            found = found or sorted(sizes, key=lambda name: -float(sizes[name]))
        return next((name for each in self.processes.gather(found[:1]) for name in each), "the gradient")

    def back_before_skipped(self) -> None:
        """Counts as if the skipped steps that came last had not been tried; their weights are those of now."""
        self.step -= self.in_a_row
        self.skipped -= self.in_a_row
        self.in_a_row = 0

    def choose(self) -> dict[str, str]:
        """Activates the plan of the step; returns its name as ``plan`` if there was a choice."""
        chosen = {"plan": plan_of_step(self.plans, self.seed, self.step)} if len(self.plans) > 1 else {}
        self.model.use_plan(chosen.get("plan", self.plans[0]))
        return chosen

    def finish(self) -> None:
        """Folds low-rank updates and freezes the model again."""
        if self.processes.shard:
            whole_student(self.model, self.lora_rank)
        else:
            fold_lora(self.model.transformer)
            self.model.transformer.requires_grad_(False)
        for block in gated_blocks(self.model.transformer):
            block.straight_through = False

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on, whole; empty in all but the main process."""
        state = {f"model/{name}": value for name, value in self.model.transformer.state_dict().items()}
        for name, parameter in self.parameters.items():
            state |= {f"optimizer/{name}/{key}": value for key, value in self.optimizers.state(parameter).items()}
        saved = {}
        for name, value in state.items():
            gathered = whole(value)
            if self.processes.main:
                saved[name] = gathered if gathered is value else gathered.cpu()
        return saved

    def _restore(self, state: RunState) -> None:
        """Takes up optimiser and step as ``tensors`` saved them."""
        for name, parameter in self.parameters.items():
            own = _below(f"optimizer/{name}/", state.tensors)
            if own:
                self.optimizers.restore(
                    parameter,
                    {key: value if key == "step" else split_like(value, parameter) for key, value in own.items()},
                )
        self.step = int(str(state.scalars["step"]))
        self.skipped, self.in_a_row = (int(str(state.scalars.get(name, 0))) for name in ("skipped", "in_a_row"))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Upkeep:
    """What a training keeps and tells beside the weights.

    Attributes:
        progress: told about the steps.
        log: gets a line per step; None in all but the main process.
        state_path: file that keeps what is done; None: nothing is kept.
        fingerprint: identifies recipe and teacher; a state with another one is refused.
        student: ``student_print`` of the model; found by the training if a state is kept and it is not given.
    """

    progress: Progress
    log: MetricsLog | None = None
    state_path: Path | None = None
    fingerprint: str = ""
    student: str = ""


def distill_model(
    model: Model,
    teacher: Model,
    recipe: Recipe,
    store: TokenStore,
    upkeep: Upkeep,
    *,
    processes: Processes | None = None,
    stages: Sequence[tuple[Stage, StageRecipe]] | None = None,
) -> None:
    """Runs stages on ``model`` in place; goes on from the state that is kept.

    Args:
        processes: those that share the work; the state is the same for any number of them.
        stages: what runs, with its settings; by default both stages of the recipe.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM, with everything done so far on disk.
        Diverged: ``SKIPPED_IN_A_ROW`` steps gave no finite gradient; what was done before them is on disk.
        CheckpointError: the state belongs to another recipe, teacher or converted model.
        InputError: a batch has fewer pyramids than there are processes, or Muon would train a student that is split.
    """
    if stages is None:
        stages = [(stage, getattr(recipe.distill, name)) for name, stage in STAGES.items()]
    names = [stage.name for stage, _ in stages]
    processes = processes or Processes(device=model.device)
    _require_rows(stages, store, processes)
    _require_whole_student(recipe, processes)
    plan = plans_of(model).name
    state_path, log = upkeep.state_path, upkeep.log
    found = processes.from_main(state_path is not None and state_path.exists())
    state = load_run_state(state_path, upkeep.fingerprint) if found and state_path is not None else None
    if state_path is not None and not upkeep.student:
        upkeep = replace(upkeep, student=processes.from_main(student_print(model) if processes.main else ""))
    if state is not None and state.scalars.get("student") != upkeep.student:
        raise CheckpointError(
            f"{state_path} is the state of a run that began with another converted model; continuing it would mix the "
            f"two. Start with that model, or delete {state_path} to start over."
        )
    begin = names.index(str(state.scalars["stage"])) if state is not None else 0
    if state is None and log is not None:
        log.rewind(-1)
    teacher.transformer.requires_grad_(False)
    with StopRequest().listening() as stop:
        for index, (stage, stage_recipe) in enumerate(stages[begin:], start=begin):
            run = StageRun(model, stage, stage_recipe, recipe.seed + index, state, processes, recipe.distill.plans)
            if state is not None and log is not None:
                log.rewind(run.step, stage=stage.name)
                for later, _ in stages[index + 1 :]:
                    log.rewind(0, stage=later.name)
            state = None
            try:
                _run_stage(run, teacher, recipe, store, upkeep, stop)
            finally:
                model.use_plan(plan)
            run.finish()


def student_print(model: Model) -> str:
    """Identifies the model that a training begins with: weights and plans."""
    own = plans_of(model)
    plans = {name: plan.model_dump(mode="json") for name, plan in own.named.items()}
    return state_fingerprint(model.transformer, plans=plans, default=own.name)


def _require_rows(stages: Sequence[tuple[Stage, StageRecipe]], store: TokenStore, processes: Processes) -> None:
    """Raises InputError if a batch has fewer pyramids than there are processes."""
    problems = [
        f"{stage.section}.batch: {min(own.batch, len(store))} pyramids per step"
        for stage, own in stages
        if own.steps and min(own.batch, len(store)) < processes.count
    ]
    if problems:
        raise InputError(
            f"{processes.count} processes share every batch, and some would get nothing; raise the batch in the recipe "
            "(--set), or start fewer processes:",
            problems,
        )


def _require_whole_student(recipe: Recipe, processes: Processes) -> None:
    """Raises InputError if a student that is split over the processes would have to be whole."""
    problems = split_problems(recipe)
    if processes.shard and problems:
        raise InputError(
            "a student that is split over the processes has no whole matrices; start without --shard, or change the "
            "recipe (--set):",
            problems,
        )


@contextmanager
def outputs_seen(modules: Mapping[str, nn.Module], look: Callable[[str, Any], None]) -> Iterator[None]:
    """While the block runs, ``look`` is told the output of every call of a module, by the module's name."""
    hooks = [
        module.register_forward_hook(lambda _, given, output, name=name: look(name, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def indifferent(model: Model) -> Iterator[dict[str, str]]:
    """Routers and gates whose choice in some call does not depend on the token, while the block runs, by name.

    A router that has collapsed ranks the experts alike for all tokens; a gate that is saturated gives all the same
    score to rounding. The value says it in words.
    """
    found: dict[str, str] = {}

    def look(name: str, score: Tensor) -> None:
        scores = score.detach().float()
        if scores.shape[:2].numel() < FEWEST_SEEN:
            return
        if isinstance(modules[name], Router):
            ranks = scores.flatten(0, -2).argsort(dim=-1, stable=True)
            if bool((ranks == ranks[0]).all()):
                found[name] = "ranks the experts alike for every token"
        elif bool(scores.std() <= 1e-5 * scores.abs().amax()):
            found[name] = "gives every token the same score"

    modules = {n: m for n, m in model.transformer.named_modules() if isinstance(m, Router | TokenGate)}
    with outputs_seen(modules, look):
        yield found


def _diverged(run: StageRun, row: str, state_path: Path | None) -> str:
    section, kept = run.stage.section, "" if state_path is None else f" Step {run.step}, before them, is kept."
    return (
        f"{run.stage.name} diverged: {row} in a row gave no finite gradient, the last in {run.faulty}.{kept} Lower "
        f"{section}.learning_rate (given {run.recipe.learning_rate:g}), give a longer {section}.warmup, or train with "
        "dtype fp32 (--set)."
    )


def _run_stage(
    run: StageRun, teacher: Model, recipe: Recipe, store: TokenStore, upkeep: Upkeep, stop: StopRequest
) -> None:
    state_path, log = upkeep.state_path, upkeep.log
    steps, device, processes = run.recipe.steps, run.model.device, run.processes
    dtype = autocast_dtype(recipe.dtype)

    def autocast() -> AbstractContextManager[object]:
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=not processes.shard)

    def save() -> None:
        if state_path is None:
            return
        scalars: dict[str, Scalar] = {"stage": run.stage.name, "step": run.step, "student": upkeep.student}
        scalars |= {"skipped": run.skipped, "in_a_row": run.in_a_row}
        tensors = run.tensors()
        if processes.main:
            save_run_state(state_path, RunState(tensors, scalars, upkeep.fingerprint))
        processes.wait()

    with upkeep.progress.task(run.stage.task, steps) as task:
        task.advance(run.step)
        saved_at, took = time.monotonic(), 0.0
        told: set[str] = set()
        while run.step < steps:
            step = run.step
            tokens, condition = store.batch(step, run.recipe.batch, run.seed)
            own, chosen = processes.part(len(tokens)), run.choose()
            condition = partly_dropped(condition, recipe.data.null_share, run.seed * 1_000_003 + step)
            nobody: AbstractContextManager[dict[str, str]] = nullcontext({})
            with indifferent(run.model) if step % LOOK_EVERY == 0 else nobody as flat:
                values = run.train_step(teacher, tokens[own].to(device), condition.rows(own).to(device), autocast())
            for name in flat.keys() - told:
                told.add(name)
                upkeep.progress.say(f"{run.stage.name}, step {step + 1}: {name} {flat[name]}")
            if run.step == step:
                break
            if log is not None:
                log.write(stage=run.stage.name, step=run.step, **chosen, **values)
            task.advance(1)
            skipped = f", {counted(run.skipped, 'step')} skipped" if run.skipped else ""
            task.note(f"loss {values['loss']:.4f}{skipped}")
            if run.in_a_row:
                upkeep.progress.say(f"{run.stage.name}, step {run.step}: skipped, not finite in {run.faulty}")
            if run.in_a_row >= min(SKIPPED_IN_A_ROW, max(1, steps // 2)):
                row = counted(run.in_a_row, "step")
                run.back_before_skipped()
                save()
                raise Diverged(_diverged(run, row, state_path))
            begin = time.monotonic()
            stopping, due = processes.any(stop.asked, begin - saved_at >= max(SAVE_EVERY, SAVE_PAUSE * took))
            if stopping or due or run.step == steps:
                save()
                saved_at = time.monotonic()
                took = saved_at - begin
            if stopping:
                kept = "nothing" if state_path is None else "all"
                raise Interrupted(f"stopped in {run.stage.name} after step {run.step} of {steps}; {kept} of it is kept")
