"""The token pyramids that a recipe asks for: a conversion measures on some, a distillation replays others."""

from __future__ import annotations

from pathlib import Path

from actvar_convert.distillation.data import (
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
    """The pyramids that a dense model's activations are measured on; kept in ``path`` as they come, where given."""
    return _store(
        model,
        recipe.calibration,
        seed=recipe.seed + 1,
        cfg=recipe.data.cfg,
        path=path,
        progress=progress,
        processes=processes,
    )


def distillation_store(
    teacher: Model, recipe: Recipe, *, path: Path | None, progress: Progress, processes: Processes = ALONE
) -> TokenStore:
    """The pyramids that a distillation replays; kept in ``path`` as they come, where given."""
    return _store(
        teacher,
        recipe.data,
        seed=recipe.seed + 2,
        cfg=recipe.data.cfg,
        path=path,
        progress=progress,
        processes=processes,
    )


def require_images(recipe: Recipe, classes: int | None, *, calibration: bool = True, data: bool = True) -> None:
    """Checks that the images of a recipe's sections are there, in as many class folders as the model has classes.

    Raises:
        InputError: they are not, all problems at once.
    """
    wanted: dict[str, CalibrationRecipe | DataRecipe] = {}
    if calibration:
        wanted["calibration"] = recipe.calibration
    if data:
        wanted["data"] = recipe.data
    problems = []
    for name, section in wanted.items():
        if section.source == "images" and section.images is not None:
            try:
                labelled_images(Path(section.images), classes)
            except InputError as error:
                problems.append(f"{name}.images: {error.message}")
    if problems:
        raise InputError("the recipe's images cannot be used; give the root of a class-per-folder tree:", problems)


def _store(
    model: Model,
    wanted: CalibrationRecipe | DataRecipe,
    *,
    seed: int,
    cfg: float | None,
    path: Path | None,
    progress: Progress,
    processes: Processes,
) -> TokenStore:
    count, batch = wanted.pyramids, wanted.batch
    if wanted.source == "images":
        if wanted.images is None:
            raise InputError("source: images needs the folder, as images: PATH")
        return store_from_images(
            model, Path(wanted.images), count, path=path, batch=batch, seed=seed, progress=progress, processes=processes
        )
    dtype = pick_dtype(wanted.dtype, model.device)
    drawing = cast(model, dtype) if dtype.itemsize < model.dtype.itemsize else model
    return store_from_teacher(
        drawing, count, path=path, batch=batch, seed=seed, cfg=cfg, progress=progress, processes=processes
    )
