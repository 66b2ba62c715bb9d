"""The one training loop: runs the stages in order, keeps metrics and resumable state.

A step depends on the seed and its own number alone (data order, dropped labels, plan), so a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from actvar_convert.checkpoint.run_state import RunState, load_run_state, save_run_state
from actvar_convert.distill.data import TokenStore
from actvar_convert.distill.lora import attach_lora, fold_lora
from actvar_convert.distill.stages import STAGES, Stage, trainable_parameters
from actvar_convert.errors import Interrupted
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.progress import MetricsLog, Progress
from actvar_convert.recipe.schema import Recipe, StageRecipe

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StopRequest:
    """Turns the first Ctrl-C into a request that the loop honours after the step in hand; a second one is immediate."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listens for the signal while the block runs; elsewhere than in the main thread it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)


def learning_rate(recipe: StageRecipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def drop_labels(labels_B: Tensor, null_class: int, share: float, seed: int) -> Tensor:
    """Labels with a random ``share`` replaced by the null class."""
    dropped = torch.rand(len(labels_B), generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(dropped, null_class, labels_B)


class StageRun:
    """One stage in progress: parameters, optimiser, averaged weights and the number of steps done."""

    def __init__(self, model: SparseVARModel, stage: Stage, recipe: StageRecipe, seed: int) -> None:
        self.model, self.stage, self.recipe, self.seed = model, stage, recipe, seed
        if recipe.trainable == "lora":
            attach_lora(model.transformer, recipe.lora_rank, seed)
        self.parameters = trainable_parameters(model, recipe)
        model.transformer.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if recipe.ema else {}
        self.step = 0

    def train_step(
        self, teacher: VARModel, tokens_BL: Tensor, labels_B: Tensor, autocast: AbstractContextManager[object]
    ) -> dict[str, float]:
        """One optimiser step; returns losses, learning rate and gradient norm."""
        recipe = self.recipe
        rate = learning_rate(recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast:
            losses = self.stage.objective(self.model, teacher, recipe, tokens_BL, labels_B)
        total = torch.stack(list(losses.values())).sum() if losses else None
        if total is None or not total.requires_grad:
            return {"loss": 0.0}
        self.optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), recipe.gradient_clip)
        self.optimizer.step()
        self.step += 1
        if self.average and recipe.ema is not None:
            weight = min(recipe.ema, (self.step + 1) / (self.step + 10))
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.detach(), 1 - weight)
        values = {name: float(value.detach()) for name, value in losses.items()}
        return {"loss": float(total.detach()), **values, "learning_rate": rate, "gradient_norm": float(norm)}

    def finish(self) -> None:
        """Puts the averaged weights in force, folds low-rank updates and freezes the model again."""
        with torch.no_grad():
            for name, value in self.average.items():
                self.parameters[name].copy_(value)
        fold_lora(self.model.transformer)
        self.model.transformer.requires_grad_(False)
        for block in self.model.transformer.blocks:
            block.straight_through = False

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on."""
        saved = {f"model/{name}": value for name, value in self.model.transformer.state_dict().items()}
        saved |= {f"average/{name}": value for name, value in self.average.items()}
        for name, parameter in self.parameters.items():
            saved |= {f"optimizer/{name}/{key}": value for key, value in self.optimizer.state[parameter].items()}
        return saved

    def restore(self, state: RunState) -> None:
        """Takes up where ``tensors`` were saved."""
        model = {name.removeprefix("model/"): t for name, t in state.tensors.items() if name.startswith("model/")}
        self.model.transformer.load_state_dict(model)
        for name in self.average:
            self.average[name] = state.tensors[f"average/{name}"].to(self.model.device)
        for name, parameter in self.parameters.items():
            prefix = f"optimizer/{name}/"
            own = {key.removeprefix(prefix): t for key, t in state.tensors.items() if key.startswith(prefix)}
            if own:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
                }
        self.step = int(state.scalars["step"])


def distill_model(
    model: SparseVARModel,
    teacher: VARModel,
    recipe: Recipe,
    store: TokenStore,
    *,
    state_path: Path,
    fingerprint: str,
    log: MetricsLog,
    progress: Progress,
) -> None:
    """Runs both stages on ``model`` in place; goes on where ``state_path`` stopped.

    Raises:
        Interrupted: after Ctrl-C, with everything done so far on disk.
        CheckpointError: the state belongs to another recipe or teacher.
    """
    names = list(STAGES)
    state = load_run_state(state_path, fingerprint) if state_path.exists() else None
    begin = names.index(str(state.scalars["stage"])) if state is not None else 0
    if state is None:
        log.rewind(-1)
    teacher.transformer.requires_grad_(False)
    with StopRequest().listening() as stop:
        for index, name in enumerate(names[begin:], start=begin):
            stage_recipe: StageRecipe = getattr(recipe.distill, name)
            run = StageRun(model, STAGES[name], stage_recipe, recipe.seed + index)
            if state is not None:
                run.restore(state)
                log.rewind(run.step, stage=name)
                state = None
            _run_stage(run, teacher, recipe, store, state_path, fingerprint, log, progress, stop)
            run.finish()
    model.use_plan(model.plan_name)


def _run_stage(
    run: StageRun,
    teacher: VARModel,
    recipe: Recipe,
    store: TokenStore,
    state_path: Path,
    fingerprint: str,
    log: MetricsLog,
    progress: Progress,
    stop: StopRequest,
) -> None:
    steps, device = run.recipe.steps, run.model.device
    dtype = AUTOCAST[recipe.dtype]

    def save() -> None:
        scalars = {"stage": run.stage.name, "step": run.step}
        save_run_state(state_path, RunState(tensors=run.tensors(), scalars=scalars, fingerprint=fingerprint))

    with progress.task(f"distilling, {run.stage.name}", steps) as task:
        task.advance(run.step)
        saved_at = time.monotonic()
        while run.step < steps:
            step = run.step
            tokens, labels = store.batch(step, run.recipe.batch, run.seed)
            labels = drop_labels(
                labels, teacher.transformer.null_class, recipe.data.null_share, run.seed * 1_000_003 + step
            )
            autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
            values = run.train_step(teacher, tokens.to(device), labels.to(device), autocast)
            if run.step == step:
                break
            log.write(stage=run.stage.name, step=run.step, **values)
            task.advance(1)
            task.note(f"loss {values['loss']:.4f}")
            due = run.step % run.recipe.checkpoint_every == 0 and time.monotonic() - saved_at > 5
            if stop.asked or due or run.step == steps:
                save()
                saved_at = time.monotonic()
            if stop.asked:
                raise Interrupted(
                    f"stopped in {run.stage.name} after step {run.step} of {steps}; the same command goes on from there"
                )
