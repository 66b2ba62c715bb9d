"""The token pyramids that a recipe asks for: a conversion measures on some, a distillation replays others."""

from __future__ import annotations

from pathlib import Path

from actvar_convert.distill.data import TokenStore, store_from_images, store_from_teacher
from actvar_convert.distill.parallel import ALONE, Processes
from actvar_convert.errors import InputError
from actvar_convert.models.casting import cast
from actvar_convert.models.model import VARModel
from actvar_convert.progress import Progress
from actvar_convert.recipe.schema import Recipe
from actvar_convert.runtime import DTYPES, pick_dtype


def calibration_store(
    model: VARModel, recipe: Recipe, *, path: Path | None = None, progress: Progress, processes: Processes = ALONE
) -> TokenStore:
    """The pyramids that a dense model's activations are measured on; kept in ``path`` as they come, where given."""
    calibration = recipe.calibration
    return _store(
        model,
        source=calibration.source,
        images=calibration.images,
        count=calibration.pyramids,
        batch=calibration.batch,
        seed=recipe.seed + 1,
        cfg=recipe.data.cfg,
        dtype=calibration.dtype,
        path=path,
        progress=progress,
        processes=processes,
    )


def distillation_store(
    teacher: VARModel, recipe: Recipe, *, path: Path, progress: Progress, processes: Processes = ALONE
) -> TokenStore:
    """The pyramids that a distillation replays; kept in ``path`` as they come."""
    data = recipe.data
    return _store(
        teacher,
        source=data.source,
        images=data.images,
        count=data.pyramids,
        batch=data.batch,
        seed=recipe.seed + 2,
        cfg=data.cfg,
        dtype=data.dtype,
        path=path,
        progress=progress,
        processes=processes,
    )


def _store(
    model: VARModel,
    *,
    source: str,
    images: str | None,
    count: int,
    batch: int,
    seed: int,
    cfg: float | None,
    dtype: str,
    path: Path | None,
    progress: Progress,
    processes: Processes,
) -> TokenStore:
    if source == "images":
        if images is None:
            raise InputError("source: images needs the folder, as images: PATH")
        return store_from_images(
            model, Path(images), count, path=path, batch=batch, seed=seed, progress=progress, processes=processes
        )
    drawing = cast(model, pick_dtype(dtype, model.device)) if DTYPES[dtype].itemsize < model.dtype.itemsize else model
    return store_from_teacher(
        drawing, count, path=path, batch=batch, seed=seed, cfg=cfg, progress=progress, processes=processes
    )
