"""The token pyramids that a recipe asks for: a conversion measures on some, a distillation replays others."""

from __future__ import annotations

from pathlib import Path

from actvar_convert.distillation.data import (
    ChosenImages,
    Making,
    TokenStore,
    chosen_images,
    store_from_images,
    store_from_teacher,
)
from actvar_convert.errors import InputError
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model
from actvar_convert.recipe.schema import CalibrationRecipe, DataRecipe, Recipe
from actvar_convert.system.device import pick_dtype
from actvar_convert.system.processes import ALONE, Processes
from actvar_convert.system.progress import Progress, SilentProgress


def calibration_store(
    model: Model, recipe: Recipe, *, path: Path | None = None, progress: Progress, processes: Processes = ALONE
) -> TokenStore:
    """The pyramids that a dense model's activations are measured on; kept in ``path`` as they come, if given."""
    return _store(model, recipe, *_calibrating(recipe), path, progress, processes)


def distillation_store(
    teacher: Model, recipe: Recipe, *, path: Path | None, progress: Progress, processes: Processes = ALONE
) -> TokenStore:
    """The pyramids that a distillation replays; kept in ``path`` as they come, if given."""
    return _store(teacher, recipe, *_training(recipe), path, progress, processes)


def require_images(recipe: Recipe, classes: int | None, progress: Progress | None = None) -> list[ChosenImages]:
    """The images that a recipe chooses for calibration and for training, all of them readable; none if it names none.

    Raises:
        InputError: they are not there, not in as many class folders as the model has classes, or cannot be read.
    """
    if recipe.data.images is None:
        return []
    choices = [(wanted.pyramids, seed) for wanted, seed in (_calibrating(recipe), _training(recipe))]
    try:
        return chosen_images(Path(recipe.data.images), classes, choices, progress or SilentProgress())
    except InputError as error:
        raise InputError(
            "the recipe's images cannot be used; give the root of a class-per-folder tree:",
            [f"data.images: {error.message}", *error.problems],
        ) from error


def _calibrating(recipe: Recipe) -> tuple[CalibrationRecipe, int]:
    return recipe.calibration, recipe.seed + 1


def _training(recipe: Recipe) -> tuple[DataRecipe, int]:
    return recipe.data, recipe.seed + 2


def _store(
    model: Model,
    recipe: Recipe,
    wanted: CalibrationRecipe | DataRecipe,
    seed: int,
    path: Path | None,
    progress: Progress,
    processes: Processes,
) -> TokenStore:
    making = Making(wanted.batch, seed, progress, path, processes)
    if recipe.data.images is not None:
        return store_from_images(model, Path(recipe.data.images), wanted.pyramids, making)
    dtype = pick_dtype(recipe.dtype, model.device)
    sampling = cast(model, dtype) if dtype.itemsize < model.dtype.itemsize else model
    return store_from_teacher(sampling, wanted.pyramids, making, cfg=recipe.data.cfg)
