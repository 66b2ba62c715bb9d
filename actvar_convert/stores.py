"""The token pyramids that a recipe asks for: a conversion measures on some, a distillation replays others."""

from __future__ import annotations

from pathlib import Path

from actvar_convert.distillation.data import (
    Making,
    TokenStore,
    labelled_images,
    store_from_images,
    store_from_teacher,
)
from actvar_convert.errors import InputError
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model
from actvar_convert.recipe.schema import CalibrationRecipe, DataRecipe, Recipe
from actvar_convert.system.device import pick_dtype
from actvar_convert.system.processes import ALONE, Processes
from actvar_convert.system.progress import Progress


def calibration_store(
    model: Model, recipe: Recipe, *, path: Path | None = None, progress: Progress, processes: Processes = ALONE
) -> TokenStore:
    """The pyramids that a dense model's activations are measured on; kept in ``path`` as they come, if given."""
    return _store(model, recipe, recipe.calibration, recipe.seed + 1, path, progress, processes)


def distillation_store(
    teacher: Model, recipe: Recipe, *, path: Path | None, progress: Progress, processes: Processes = ALONE
) -> TokenStore:
    """The pyramids that a distillation replays; kept in ``path`` as they come, if given."""
    return _store(teacher, recipe, recipe.data, recipe.seed + 2, path, progress, processes)


def require_images(recipe: Recipe, classes: int | None) -> None:
    """Checks that a recipe's images are there, in as many class folders as the model has classes.

    Raises:
        InputError: they are not.
    """
    if recipe.data.images is not None:
        try:
            labelled_images(Path(recipe.data.images), classes)
        except InputError as error:
            raise InputError(
                "the recipe's images cannot be used; give the root of a class-per-folder tree:",
                [f"data.images: {error.message}"],
            ) from error


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
