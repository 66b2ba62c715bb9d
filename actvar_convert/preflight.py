"""Everything that is checked before work, in one list that every verb asks, with or without weights.

``validate_recipe`` asks it of a recipe whose model is known by its shape alone, and says what the recipe amounts to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.conversion.conversion_memory import MemoryEstimate, estimate_convert
from actvar_convert.cost.flops import count_flops
from actvar_convert.distillation.training_memory import estimate_distill
from actvar_convert.errors import InputError, RecipeError, counted
from actvar_convert.files.source import model_shape
from actvar_convert.measure.extractors import require_reference
from actvar_convert.measure.quality_report import load_quality
from actvar_convert.models.families import family_of
from actvar_convert.models.infinity.text import TextRows
from actvar_convert.models.model import Model
from actvar_convert.models.schedule import Config
from actvar_convert.recipe.check import split_problems
from actvar_convert.recipe.load import RecipeSource, load_recipe
from actvar_convert.recipe.schema import Phase, Recipe
from actvar_convert.stores import RecipeImages, require_images
from actvar_convert.system.device import bf16_is_emulated, free_memory_bytes, named_device, pick_device
from actvar_convert.system.processes import Processes
from actvar_convert.system.progress import Progress, SilentProgress


@dataclass(frozen=True)
class Job:
    """What is about to be done, as far as a check looks at it.

    Attributes:
        recipe: resolved, and checked against the shape of the model.
        config: shape of the dense transformer.
        processes: how many share the training.
        sharded: whether the student is split over them.
        prompted: whether the model has prompts already.
        progress: told about checks that take long.
    """

    recipe: Recipe
    config: Config
    processes: int = 1
    sharded: bool = False
    prompted: bool = False
    progress: Progress = field(default_factory=SilentProgress)

    @classmethod
    def of(cls, model: Model, recipe: Recipe, processes: Processes, progress: Progress) -> Job:
        """A recipe on a loaded model."""
        return cls(recipe, model.config, processes.count, processes.shard, model.prompts is not None, progress)


def require_ready(job: Job, *phases: Phase) -> RecipeImages | None:
    """Asks all of ``CHECKS`` that concern one of the phases, and then the images, of which every one is opened.

    Returns:
        the images that the recipe chooses, all of them readable; None if it names none.

    Raises:
        RecipeError: everything that is wrong, all problems at once.
    """
    problems = [problem for own, check in CHECKS if set(own) & set(phases) for problem in check(job)]
    images = None
    if {"convert", "train"} & set(phases):
        try:
            images = require_images(job.recipe, family_of(job.config).classes(job.config), job.progress)
        except InputError as error:
            problems += error.problems
    if problems:
        raise RecipeError(f"recipe {job.recipe.name!r}: {counted(len(problems), 'problem')}", problems)
    if job.recipe.dtype == "bf16" and bf16_is_emulated(_device_here(job.recipe.device)):
        job.progress.say("this CPU has no instructions for bf16, which takes several times as long: --set dtype=fp32")
    return images


def _device(job: Job) -> Iterator[str]:
    if job.recipe.device is not None:
        yield from _said("device", lambda: named_device(str(job.recipe.device)))


def _rows_for_all(job: Job) -> Iterator[str]:
    for name, stage in (("stage1", job.recipe.distill.stage1), ("stage2", job.recipe.distill.stage2)):
        if stage.steps and stage.batch < job.processes:
            yield (
                f"distill.{name}.batch: given {stage.batch}, for {job.processes} processes at least {job.processes}, "
                "one for each"
            )


def _split(job: Job) -> Iterator[str]:
    if job.sharded:
        yield from split_problems(job.recipe)


def _reference(job: Job) -> Iterator[str]:
    reference = job.recipe.evaluate.reference
    if reference is not None:
        yield from _said("evaluate.reference", lambda: require_reference(Path(reference)))


def _prompts(job: Job) -> Iterator[str]:
    family, rows = family_of(job.config), job.recipe.data.rows
    if not getattr(family, "reads_text", False):
        if rows is not None:
            yield "data.rows: given, and the model makes no images of text; leave it out"
        return
    if job.recipe.data.images is not None:
        yield "data.images: given, and the model makes images of text, which such a folder has none of; leave it out"
    if rows is not None:
        yield from _said("data.rows", lambda: family.condition(job.config, TextRows.load(Path(rows))))
    elif not job.prompted:
        yield (
            f"data.rows: not given, and {family.name} makes images of text: name a file of the text rows of prompts "
            "(TextRows.save). A recipe of a model of classes has none; take one that was made for this family"
        )


def _baseline(job: Job) -> Iterator[str]:
    baseline = None if job.recipe.checks is None else job.recipe.checks.baseline
    if baseline is not None:
        yield from _said("checks.baseline", lambda: load_quality(Path(baseline)))


def _budget(job: Job) -> Iterator[str]:
    try:
        recipe_plans(job.config, job.recipe)
    except RecipeError as error:
        yield str(error)


def _said(where: str, look: Callable[[], object]) -> Iterator[str]:
    try:
        look()
    except InputError as error:
        yield f"{where}: {error.message}"
        yield from error.problems


CHECKS: tuple[tuple[tuple[Phase, ...], Callable[[Job], Iterator[str]]], ...] = (
    (("convert", "train", "measure"), _device),
    (("train",), _rows_for_all),
    (("train",), _split),
    (("convert", "train", "measure"), _prompts),
    (("measure",), _reference),
    (("measure",), _baseline),
    (("convert",), _budget),
)
"""What is checked before work beside a recipe against itself and its model (``recipe/check.py``), and for which phases.

Memory comes after it, since it is asked of the machine: ``conversion_memory`` and ``distillation_memory``.
"""


def conversion_memory(model: Model, recipe: Recipe, *, keep: bool = True) -> MemoryEstimate:
    """What converting a loaded model will need, see ``convert``."""
    config, tokenizer, device = model.config, model.tokenizer.config, model.device.type
    return estimate_convert(config, tokenizer, recipe, keep=keep, itemsize=model.dtype.itemsize, device=device)


def distillation_memory(teacher: Model, recipe: Recipe, processes: Processes) -> MemoryEstimate:
    """What each of the processes that share a distillation will need."""
    return estimate_distill(
        teacher.config,
        teacher.tokenizer.config,
        recipe,
        processes=processes.count,
        sharded=processes.shard,
        device=teacher.device.type,
    )


class PlanFigures(BaseModel):
    """What one plan of a recipe leads to."""

    model_config = ConfigDict(frozen=True)

    flops: int = Field(description="of the sparse transformer per image, with guidance")
    reduction: float = Field(description="share of the dense transformer's FLOPs that the plan saves")


class ValidationResult(BaseModel):
    """A recipe that fits its model, and what it amounts to."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="of the recipe")
    model: str = Field(description="the dense model in one line")
    dense_flops: int = Field(description="of the dense transformer per image, with guidance")
    plans: dict[str, PlanFigures]
    default_plan: str
    convert_bytes: int = Field(description="estimated peak memory of `actvar convert`, on a CPU, the weights included")
    distill_bytes: int = Field(description="estimated peak memory of the distillation, on each device")
    processes: int = Field(1, description="those that share the distillation, each on a device of its own")
    sharded: bool = Field(False, description="whether the student is split over them")
    machine_free_bytes: int = Field(description="memory of this machine that a command could hold now")
    device: str = Field(description="where a distillation would run here: cpu, cuda, ...")
    device_free_bytes: int = Field(description="memory of one such device that a command could hold now")

    @property
    def convert_fits(self) -> bool:
        """Whether the conversion, on the CPU, finds the memory that it needs here and now."""
        return self.convert_bytes <= self.machine_free_bytes

    @property
    def distill_here_bytes(self) -> int:
        """What the distillation needs of ``device_free_bytes``: processes on CPUs share the memory of the machine."""
        return self.distill_bytes * (self.processes if self.device == "cpu" else 1)

    @property
    def distill_fits(self) -> bool:
        """Whether the distillation finds the memory that it needs here and now."""
        return self.distill_here_bytes <= self.device_free_bytes


def validate_recipe(
    recipe: RecipeSource, overrides: Sequence[str] = (), *, processes: int = 1, sharded: bool = False
) -> ValidationResult:
    """Checks a recipe by itself and against the model that it names, whose weights are not read.

    Args:
        recipe: name, file or Recipe. Its model is an official name (no file needed), a bundled one, or a path.
        overrides: settings as ``a.b=value``.
        processes: how many are to share the distillation, as ``torchrun`` would start them.
        sharded: the student is split over them, as with ``--shard``.

    Raises:
        InputError: a number of processes that cannot be.
        RecipeError: everything that is wrong, all problems at once; also a budget that no plan reaches.
    """
    if processes < 1 or (sharded and processes == 1):
        raise InputError(f"processes: {processes} given; at least {2 if sharded else 1} needed")
    shapes: list[tuple[Config, Any, str]] = []

    def config_of(chosen: Recipe) -> Config:
        shape = model_shape(chosen.model, chosen.vae, shape=chosen.shape)
        if shape.plans:
            raise InputError(f"{chosen.model} is no dense VAR: {shape.line}")
        if shape.tokenizer is None:
            raise InputError(
                f"{chosen.model} has no tokenizer in it or beside it; name its file under vae (--set vae=FILE)"
            )
        config: Config = shape.transformer
        shapes.append((config, shape.tokenizer, shape.line))
        return config

    chosen = load_recipe(recipe, overrides, config=config_of)
    config, tokenizer, line = shapes[-1]
    require_ready(Job(chosen, config, processes, sharded), "convert", "train", "measure")
    plans, default = recipe_plans(config, chosen)
    reports = {name: count_flops(config, None, {name: plan}, name) for name, plan in plans.items()}
    figures = {}
    for name, report in reports.items():
        assert report.sparse is not None and report.reduction is not None
        figures[name] = PlanFigures(flops=report.sparse.transformer.flops, reduction=report.reduction.transformer)
    device = _device_here(chosen.device)
    return ValidationResult(
        name=chosen.name,
        model=line,
        dense_flops=reports[default].dense.transformer.flops,
        plans=figures,
        default_plan=default,
        convert_bytes=estimate_convert(config, tokenizer, chosen).total,
        distill_bytes=estimate_distill(config, tokenizer, chosen, processes=processes, sharded=sharded).total,
        processes=processes,
        sharded=sharded,
        machine_free_bytes=free_memory_bytes(),
        device=device.type,
        device_free_bytes=free_memory_bytes(device),
    )


def _device_here(name: str | None) -> torch.device:
    """The device of a recipe, or what it would run on here if this machine has none of that kind."""
    try:
        return pick_device(name)
    except InputError:
        return pick_device()
