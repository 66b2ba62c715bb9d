"""The token pyramids that a recipe asks for: a conversion measures on some, a distillation replays others."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
from actvar_convert.models.infinity.text import TextRows
from actvar_convert.models.model import Model
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.device import pick_dtype
from actvar_convert.system.processes import ALONE, Processes
from actvar_convert.system.progress import Progress, SilentProgress


class RecipeImages(NamedTuple):
    """The images that a recipe chooses of those that it names."""

    calibration: ChosenImages
    training: ChosenImages


def calibration_store(
    model: Model,
    recipe: Recipe,
    images: RecipeImages | None,
    *,
    path: Path | None = None,
    progress: Progress,
    processes: Processes = ALONE,
) -> TokenStore:
    """The pyramids that a dense model's activations are measured on; kept in ``path`` as they come, if given."""
    making = Making(recipe.calibration.batch, _seeds(recipe)[0], progress, path, processes)
    return _store(model, recipe, images and images.calibration, recipe.calibration.pyramids, making)


def distillation_store(
    teacher: Model,
    recipe: Recipe,
    images: RecipeImages | None,
    *,
    path: Path | None,
    progress: Progress,
    processes: Processes = ALONE,
) -> TokenStore:
    """The pyramids that a distillation replays; kept in ``path`` as they come, if given."""
    making = Making(recipe.data.batch, _seeds(recipe)[1], progress, path, processes)
    return _store(teacher, recipe, images and images.training, recipe.data.pyramids, making)


def require_images(recipe: Recipe, classes: int | None, progress: Progress | None = None) -> RecipeImages | None:
    """The images that a recipe chooses, all of them readable; None if it names none.

    Raises:
        InputError: they are not there, not in as many class folders as the model has classes, or cannot be read.
    """
    if recipe.data.images is None:
        return None
    choices = zip((recipe.calibration.pyramids, recipe.data.pyramids), _seeds(recipe), strict=True)
    try:
        return RecipeImages(
            *chosen_images(Path(recipe.data.images), classes, list(choices), progress or SilentProgress())
        )
    except InputError as error:
        problem = f"data.images: {error.message}; give the root of a class-per-folder tree"
        raise InputError("the recipe's images cannot be used:", [problem, *error.problems]) from error


def prompted(model: Model, recipe: Recipe) -> Model:
    """The model with the prompts that a recipe names, if it names some and the model reads text.

    Raises:
        InputError: the file cannot be read, or its rows do not fit the model.
    """
    if recipe.data.rows is None or not getattr(model.family, "reads_text", False):
        return model
    return model.with_prompts(TextRows.load(Path(recipe.data.rows)))


def _seeds(recipe: Recipe) -> tuple[int, int]:
    """Of the pyramids of calibration and training."""
    return recipe.seed + 1, recipe.seed + 2


def _store(model: Model, recipe: Recipe, images: ChosenImages | None, count: int, making: Making) -> TokenStore:
    if images is not None:
        return store_from_images(model, images, making)
    dtype = pick_dtype(recipe.dtype, model.device)
    sampling = cast(model, dtype) if dtype.itemsize < model.dtype.itemsize else model
    return store_from_teacher(sampling, count, making, cfg=recipe.data.cfg)
