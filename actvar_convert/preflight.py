"""Proving a recipe against the model that it names: everything that can be wrong with it is found without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.conversion.conversion_memory import estimate_convert
from actvar_convert.cost.flops import count_flops
from actvar_convert.distillation.training_memory import estimate_distill
from actvar_convert.errors import InputError, RecipeError, counted
from actvar_convert.files.source import model_shape
from actvar_convert.measure.extractors import require_reference
from actvar_convert.measure.quality_report import load_quality
from actvar_convert.models.families import family_of
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.recipe.check import split_problems
from actvar_convert.recipe.load import RecipeSource, load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.stores import require_images
from actvar_convert.system.device import free_memory_bytes, named_device, pick_device


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
    convert_bytes: int = Field(description="estimated peak memory of the conversion, on a CPU with mapped weights")
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
    shapes: list[tuple[TransformerConfig, TokenizerConfig, str]] = []

    def config_of(chosen: Recipe) -> TransformerConfig:
        shape = model_shape(chosen.model, chosen.vae, shape=chosen.shape)
        if shape.plans:
            raise InputError(f"{chosen.model} is no dense VAR: {shape.line}")
        if shape.tokenizer is None:
            raise InputError(
                f"{chosen.model} has no tokenizer in it or beside it; name its file under vae (--set vae=FILE)"
            )
        shapes.append((shape.transformer, shape.tokenizer, shape.line))
        return shape.transformer

    chosen = load_recipe(recipe, overrides, config=config_of)
    wrong = [
        f"distill.{name}.batch: given {stage.batch}, for {processes} processes at least {processes}, one for each"
        for name, stage in (("stage1", chosen.distill.stage1), ("stage2", chosen.distill.stage2))
        if stage.steps and stage.batch < processes
    ]
    wrong += split_problems(chosen) if sharded else []
    config, tokenizer, line = shapes[-1]
    wrong += _not_at_hand(chosen, family_of(config).classes(config))
    if wrong:
        raise RecipeError(f"recipe {chosen.name!r}: {counted(len(wrong), 'problem')}", wrong)
    try:
        plans, default = recipe_plans(config, chosen)
    except RecipeError as error:
        raise RecipeError(f"recipe {chosen.name!r}: 1 problem", [str(error)]) from error
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


def _not_at_hand(recipe: Recipe, classes: int | None) -> list[str]:
    """What a recipe names beside its model and that no machine has, or that is not there, or no such thing."""
    baseline = None if recipe.checks is None else recipe.checks.baseline
    named: list[tuple[str, Callable[[str], object], str | None]] = [
        ("device", named_device, recipe.device),
        ("evaluate.reference", lambda path: require_reference(Path(path)), recipe.evaluate.reference),
        ("checks.baseline", lambda path: load_quality(Path(path)), baseline),
    ]
    problems = []
    for where, look, given in named:
        if given is not None:
            try:
                look(given)
            except InputError as error:
                problems += [f"{where}: {error.message}", *error.problems]
    try:
        require_images(recipe, classes)
    except InputError as error:
        problems += error.problems
    return problems


def _device_here(name: str | None) -> torch.device:
    """The device of a recipe, or what it would run on here if this machine has none of that kind."""
    try:
        return pick_device(name)
    except InputError:
        return pick_device()
