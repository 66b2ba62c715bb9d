"""``sweep``: quality against cost of a dense model at a series of cuts, without training.

Every cut is converted on the same calibration pyramids and measured on the same held-out ones. Points stay in
``OUT/sweep.json`` as they come: the same call goes on from there, and one with other cuts adds to the curve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actvar_convert import verbs
from actvar_convert.conversion.activations import Calibration
from actvar_convert.conversion.budget import uniform_plan
from actvar_convert.conversion.conversion_memory import require_memory
from actvar_convert.conversion.converter import conversion_steps, convert_model
from actvar_convert.conversion.search import Planned, plan_model, search_steps, searches
from actvar_convert.cost.flops import count_flops
from actvar_convert.distillation.data import TokenStore
from actvar_convert.errors import InputError, RecipeError
from actvar_convert.measure.cuts import CutMeasurement, SweepPoint, SweepReport, largest_within
from actvar_convert.measure.evaluation import Evaluation
from actvar_convert.measure.image_features import model_fingerprint
from actvar_convert.models.model import Model
from actvar_convert.origins import Work, require_dense
from actvar_convert.preflight import conversion_memory
from actvar_convert.recipe.check import check_recipe
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import FEWEST_IMAGES, DistillRecipe, Recipe
from actvar_convert.show.charts import sweep_picture
from actvar_convert.show.tables import sweep_figures
from actvar_convert.stores import calibration_store, prompted, require_images
from actvar_convert.system import locks
from actvar_convert.system.atomic import write_whole
from actvar_convert.system.device import trim_memory
from actvar_convert.system.paths import path_of
from actvar_convert.system.processes import join
from actvar_convert.system.progress import Progress, SilentProgress

REDUCTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Cuts that a sweep makes unless it is told others, as shares of the transformer's FLOPs."""

REPORT, TABLE, PICTURE = "sweep.json", "sweep.csv", "sweep.png"

_UNUSED: dict[str, Any] = {
    **dict.fromkeys(("name", "description", "model", "vae", "shape", "device"), True),
    **dict.fromkeys(("plans", "default_plan", "distill", "benchmark", "checks"), True),
    "budget": {"reduction", "plans", "guidance"},
    "data": {"pyramids", "null_share", "batch"},
    "evaluate": {"images", "held_out"},
}
"""Settings of a recipe that the points of a sweep do not depend on."""


def sweep(
    model: Model,
    *,
    recipe: verbs.RecipeLike,
    reductions: Sequence[float] = REDUCTIONS,
    images: int = 0,
    max_kl: float | None = None,
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Quality against cost of a dense model: one conversion per cut, none of them trained.

    Args:
        model: the dense model, left as it is.
        recipe: name, file or Recipe: the method, and the budget of which ``reduction`` is swept. Plans that it names
            are not used.
        reductions: shares of the transformer's FLOPs to save, within 0 to 1; one out of reach becomes a point that says
            so.
        images: generated per model for FID; 0 leaves FID out.
        max_kl: a limit in nats per token; the report names the largest cut that stays within it.
        out: folder for ``sweep.json``, ``sweep.csv`` and ``sweep.png``; points of the same sweep that are there already
            are taken up.
        work: folder in which calibration pyramids and features wait until the end, ``OUT.work`` beside ``out`` by
            default; without ``out`` nothing waits.
        progress: told about every long step.

    Raises:
        RecipeError: the recipe does not fit the model, all problems at once, before any work.
        InputError: values that make no sense, another sweep or something else in ``out``, too little memory, or another
            process is at it.
    """
    require_dense(model)
    progress = progress or SilentProgress()
    chosen = _recipe(recipe, model)
    held_out = chosen.evaluate.held_out
    _check(reductions, images, max_kl)
    given = require_images(chosen, model.family.classes(model.config), progress)
    model = prompted(model, chosen)
    extractor = verbs.extractor_for(model, chosen.evaluate.reference) if images else None
    dense_print = model_fingerprint(model)
    method = chosen.model_dump_json(exclude=_UNUSED)
    sampling = tuple(model.sampling.settings.values())
    parts = [dense_print, method, held_out, sampling]
    if given is not None:
        parts.append(given.calibration.fingerprint)
    if extractor is not None and chosen.evaluate.reference is not None:
        parts.append(extractor.reference().fingerprint)
    fingerprint = hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()
    folder = None if out is None else path_of(out)
    keeping = None if folder is None else Work.of(folder, work)
    with nullcontext() if keeping is None else keeping.owned(join(model.device)):
        points = {} if folder is None else _stored(folder, fingerprint)

        def report() -> SweepReport:
            best = largest_within(points.values(), max_kl)
            return SweepReport(
                model=model.origin.get("name") or model.origin.get("path") or chosen.model,
                recipe=chosen.name,
                fingerprint=fingerprint,
                calibration_pyramids=chosen.calibration.pyramids,
                held_out=held_out,
                dense_flops=count_flops(model.config).dense.transformer.flops,
                points=tuple(points[target] for target in sorted(points)),
                max_kl=max_kl,
                chosen=None if best is None else best.target,
            )

        targets = []
        for target in sorted(set(reductions)):
            if target not in points or not _complete(points[target], images):
                try:
                    uniform_plan(model.config, chosen, target)
                    targets.append(target)
                except RecipeError as error:
                    points[target] = SweepPoint(target=target, problem=str(error))
        if targets:
            require_memory(conversion_memory(model, _asking(chosen, targets)), model.device)
            kept = None if keeping is None else keeping.folder
            path = None if kept is None else kept / f"calibration-{fingerprint[:12]}.bin"
            store = calibration_store(model, chosen, given, path=path, progress=progress)
            settings = chosen.evaluate
            evaluation = Evaluation(images, settings.seeds, settings.batch, held_out, dtype=chosen.dtype)
            measurement = CutMeasurement(
                model, evaluation, extractor, work=kept, fingerprint=dense_print, progress=progress
            )
            planned = _planned(model, chosen, targets, store, progress)
            for target in targets:
                sparse = _converted(model, chosen, target, planned, store, progress)
                points[target] = measurement.point(target, sparse, planned.damage.get(str(target)))
                trim_memory()
                if folder is not None:
                    write_whole(folder / REPORT, report().to_json())
        made = report()
        if folder is not None:
            write_whole(folder / PICTURE, sweep_picture(made))
            write_whole(folder / TABLE, sweep_figures(made).to_csv())
            write_whole(folder / REPORT, made.to_json())
        if keeping is not None:
            locks.clear(keeping.folder)
        return made


def _recipe(source: verbs.RecipeLike, model: Model) -> Recipe:
    """The recipe without stated plans and without what belongs to training, checked against the model."""
    given = load_recipe(source, config=model.config)
    chosen = given.model_copy(
        update={
            **{"plans": None, "default_plan": None, "distill": DistillRecipe(), "checks": None},
            "budget": given.budget.model_copy(update={"plans": {}, "guidance": "paired"}),
        }
    )
    check_recipe(chosen, model.config)
    return chosen


def _check(reductions: Sequence[float], images: int, max_kl: float | None) -> None:
    problems = []
    outside = [value for value in reductions if not 0 < value < 1]
    if not reductions or outside:
        problems.append(f"reductions: {outside or 'none'} given, shares between 0 and 1 needed, such as 0.2")
    if images and images < FEWEST_IMAGES:
        problems.append(f"images: {images} given, 0 (no FID) or at least {FEWEST_IMAGES} needed")
    if max_kl is not None and not max_kl > 0:
        problems.append(f"max_kl: {max_kl} given, more than 0 needed")
    if problems:
        raise InputError("this sweep cannot run", problems)


def _stored(folder: Path, fingerprint: str) -> dict[float, SweepPoint]:
    """Points of this very sweep that a folder holds already; a folder that is not there yet, or empty, holds none.

    Raises:
        InputError: the folder holds another sweep, or something else.
    """
    path = folder / REPORT
    if path.is_file():
        try:
            found = SweepReport.model_validate_json(path.read_bytes())
        except ValidationError:
            found = None
        if found is None or found.fingerprint != fingerprint:
            raise InputError(
                f"{path} is a sweep of another model, with other settings or images, or by another version. Move it "
                "away, or choose another folder with --out."
            )
        return {point.target: point for point in found.points}
    if folder.exists() and not (folder.is_dir() and all(entry.name.startswith(".") for entry in folder.iterdir())):
        raise InputError(f"{folder} exists and holds no sweep. Move it away, or choose another folder with --out.")
    return {}


def _complete(point: SweepPoint, images: int) -> bool:
    """Whether a stored point has all that is asked for."""
    return point.problem is not None or not images or (point.fid is not None and point.fid.images == images)


def _asking(recipe: Recipe, targets: Sequence[float]) -> Recipe:
    """The recipe, asking for a plan of every target."""
    wanted = {"reduction": targets[0], "plans": {str(target): target for target in targets}}
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update=wanted)})


def _planned(model: Model, recipe: Recipe, targets: Sequence[float], store: TokenStore, progress: Progress) -> Planned:
    """The plans of all targets, each under its target's name; a search looks at the model once."""
    asking = _asking(recipe, targets)
    calibration = Calibration(store.tokens, store.condition, recipe.calibration.batch)
    if not searches(asking):
        return plan_model(model, asking, calibration)
    with progress.task("searching plans", search_steps(model.config, asking)) as task:
        return plan_model(model, asking, calibration, on_step=task.advance)


def _converted(
    model: Model, recipe: Recipe, target: float, planned: Planned, store: TokenStore, progress: Progress
) -> Model:
    steps = conversion_steps(model.config, recipe)
    with progress.task(f"converting, {100 * target:g} % fewer FLOPs", steps) as task:
        own = planned._replace(plans={"default": planned.plans[str(target)]}, default="default")
        calibration = Calibration(store.tokens, store.condition, recipe.calibration.batch)
        return convert_model(model, own, recipe, calibration, on_block=task.advance)
