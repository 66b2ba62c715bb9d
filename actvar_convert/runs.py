"""``run``: a recipe from the dense model to the measured sparse folder, resumable at every step.

Steps leave their results in ``OUT.work`` until the folder ``OUT`` is complete: the converted model, the teacher's
samples, the state of the distillation, the features of the evaluation. The same call goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel

from actvar_convert import verbs
from actvar_convert.conversion.conversion_memory import require_memory
from actvar_convert.cost.flops import FlopsReport
from actvar_convert.errors import InputError
from actvar_convert.files.published import official_files, official_names
from actvar_convert.files.sparse_folder import read_provenance, refuse_foreign, save_sparse, update_file
from actvar_convert.measure.checks import CheckTable, require_comparable, run_checks
from actvar_convert.measure.distances import pairs_of
from actvar_convert.measure.evaluation import Evaluation
from actvar_convert.measure.extractors import FeatureExtractor
from actvar_convert.measure.latency import BenchmarkReport, Timing, hardware_name
from actvar_convert.measure.quality_report import QualityReport, SamplingSettings, load_quality
from actvar_convert.models.model import Model
from actvar_convert.models.schedule import Config
from actvar_convert.models.split import plans_of
from actvar_convert.origins import (
    Run,
    Work,
    class_names,
    finished_model,
    refuse_distilled,
    refuse_other_state,
)
from actvar_convert.preflight import Job, distillation_memory, require_ready
from actvar_convert.recipe.load import dump_recipe, load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.show.card import model_card
from actvar_convert.show.html import report_html
from actvar_convert.show.pictures import samples_picture
from actvar_convert.show.tables import Reports
from actvar_convert.stores import prompted
from actvar_convert.system.device import DTYPES
from actvar_convert.system.paths import path_of
from actvar_convert.system.processes import Processes, join
from actvar_convert.system.progress import MetricsLog, Progress, SilentProgress

Report = TypeVar("Report", bound=BaseModel)


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        folder: the sparse folder.
        flops, quality, benchmark: the reports, also in the folder as JSON.
        checks: given against allowed, when the recipe has checks.
    """

    folder: Path
    flops: FlopsReport
    quality: QualityReport
    benchmark: BenchmarkReport
    checks: CheckTable | None


def run(
    recipe: verbs.RecipeLike,
    *,
    out: str | Path | None = None,
    work: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    shard: bool = False,
) -> RunResult:
    """Converts, distils, measures and illustrates, as a recipe says.

    Of several processes that a launcher started together, all sample and distil; the main one does the rest.

    Args:
        recipe: name, file or Recipe.
        out: the folder to make; ``runs/NAME`` by default, in which a distilled model of another run is not replaced.
            One that holds the same run already is measured again only if a report is missing or was made with other
            settings.
        work: folder in which steps leave their results until ``out`` is complete, ``OUT.work`` beside it by default.
        overrides: settings as ``a.b=value``.
        progress: told about every long step.
        shard: see ``distill``.

    Raises:
        RecipeError: everything that is wrong with the recipe, before any work.
        InputError: a folder holds something else, what the recipe names cannot be used, or another process is at it.
        Interrupted: after Ctrl-C or SIGTERM; the same call goes on.

    The recipe's checks are evaluated, not enforced: ``result.checks.raise_if_failed()`` does.
    """
    teachers: list[Model] = []

    def config_of(recipe: Recipe) -> Config:
        place = path_of(out) if out is not None else Path("runs") / recipe.name
        begun = any((each / "config.json").exists() for each in (place, Work.of(place, work).converted))
        due = None if begun else recipe  # what is converted already needs no memory for it
        made = verbs.load(recipe.model, vae=recipe.vae, device=recipe.device, recipe=due, shape=recipe.shape)
        teachers.append(made)
        config: Config = made.config
        return config

    chosen = load_recipe(recipe, overrides, config=config_of)
    teacher = teachers[-1]
    processes = join(teacher.device, shard=shard)
    progress = progress if progress is not None and processes.main else SilentProgress()
    folder = path_of(out) if out is not None else Path("runs") / chosen.name
    refuse_foreign(folder)
    images = require_ready(Job.of(teacher, chosen, processes, progress), "convert", "train", "measure")
    teacher = prompted(teacher, chosen)
    extractor = _extractor(chosen, teacher, progress)
    baseline = _baseline(chosen, teacher, extractor)
    own = Run.of(teacher, chosen, images)
    keeping = Work.of(folder, work)
    with keeping.owned(processes):
        model = _finished(folder, own.key, teacher)
        if model is None:
            if out is None:
                refuse_distilled(folder)
            refuse_other_state(keeping, own.key)
            model = _make(teacher, own, keeping, progress, processes)
        measured = None
        if processes.main:
            measured = _measure(model, teacher, chosen, keeping, extractor, baseline, progress)
            keeping.clear(own)
        result = processes.from_main(measured)
    assert result is not None
    return result


def _extractor(recipe: Recipe, teacher: Model, progress: Progress) -> FeatureExtractor | None:
    """What judges the images; None, which is said, if the recipe names none and no bundled classifier knows them.

    Raises:
        InputError: what the recipe names cannot judge, or one of its checks needs a judge.
    """
    if recipe.evaluate.reference is not None:
        return verbs.extractor_for(teacher, recipe.evaluate.reference)
    try:
        return verbs.extractor_for(teacher)
    except InputError as error:
        if recipe.checks is not None and recipe.checks.max_fid_increase is not None:
            raise InputError(f"checks.max_fid_increase needs a FID: {error.message}", error.problems) from error
    progress.say("no bundled classifier knows such images: FID and its companions are left out (evaluate.reference)")
    return None


def _measured_by(recipe: Recipe, teacher: Model, extractor: FeatureExtractor | None) -> dict[str, object]:
    """How a recipe's evaluation measures, as its report will say."""
    settings = recipe.evaluate
    return {
        "images": 0 if extractor is None else settings.images,
        "sampling": SamplingSettings(**teacher.sampling.settings, chunk=settings.batch),
        "dtype": str(DTYPES[recipe.dtype]).removeprefix("torch."),
        "extractor": None if extractor is None else extractor.name,
        "reference": None if extractor is None else extractor.reference().fingerprint,
    }


def _baseline(recipe: Recipe, teacher: Model, extractor: FeatureExtractor | None) -> QualityReport | None:
    """The evaluation that the recipe's checks compare with, read and found comparable before any work."""
    if recipe.checks is None or recipe.checks.baseline is None:
        return None
    baseline = load_quality(Path(recipe.checks.baseline))
    require_comparable(baseline, _measured_by(recipe, teacher, extractor))
    return baseline


def _finished(folder: Path, fingerprint: str, teacher: Model, *, distilled: bool = True) -> Model | None:
    """What this very run left in ``folder``, on the teacher's device."""
    found = finished_model(folder, fingerprint, distilled=distilled)
    return None if found is None else found.to(teacher.device)


def _make(teacher: Model, run: Run, work: Work, progress: Progress, processes: Processes) -> Model:
    """Converts and distils."""
    recipe = run.recipe
    sparse = _finished(work.converted, run.key, teacher, distilled=False)
    require_memory(distillation_memory(teacher, recipe, processes), teacher.device)
    if sparse is None:
        sparse = verbs.convert(teacher, recipe=recipe, work=work.folder, progress=progress, run=run)
        if processes.main:
            save_sparse(sparse, work.converted, provenance=run.origin, recipe_text=dump_recipe(recipe))
    return verbs.distill(
        sparse,
        teacher=teacher,
        recipe=recipe,
        out=work.out,
        work=work.folder,
        progress=progress,
        run=run,
        shard=processes.shard,
    )


def _stored(path: Path, kind: type[Report]) -> Report | None:
    """A report of this run that an earlier call left; None if it is missing or was edited into something else."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _measured_as(quality: QualityReport, recipe: Recipe, measurement: Mapping[str, object]) -> bool:
    """Whether a stored evaluation is the one that a recipe asks for."""
    settings = recipe.evaluate
    pairs = None if quality.distances is None else quality.distances.pairs
    own = (quality.seeds, quality.kl.pyramids, pairs)
    same = all(getattr(quality, name) == value for name, value in measurement.items())
    return same and own == (settings.seeds, settings.held_out, pairs_of(settings.images, settings.batch))


def _timed_as(benchmark: BenchmarkReport, timing: Timing, device: torch.device) -> bool:
    """Whether a stored benchmark is the one that a recipe asks for, made on this machine's device."""
    timed = {(row.device, row.dtype, row.batch) for row in benchmark.rows}
    asked = set(product([str(device)], timing.names, timing.batches))
    own = (benchmark.repeats, benchmark.hardware)
    return timed == asked and own == (timing.repeats, hardware_name(device))


def _measure(
    model: Model,
    teacher: Model,
    recipe: Recipe,
    work: Work,
    extractor: FeatureExtractor | None,
    baseline: QualityReport | None,
    progress: Progress,
) -> RunResult:
    """Reports, picture and card; each is written when it is ready, evaluation first since it takes longest."""
    folder, flops = work.out, verbs.report_flops(model)
    update_file(folder, "flops.json", flops.to_json().encode())
    settings = recipe.evaluate
    quality = _stored(folder / "eval.json", QualityReport)
    if quality is None or not _measured_as(quality, recipe, _measured_by(recipe, teacher, extractor)):
        quality = verbs.evaluate(
            model,
            teacher=teacher,
            settings=Evaluation(
                images=settings.images,
                seeds=settings.seeds,
                batch=settings.batch,
                held_out=settings.held_out,
                plans=[name for name in plans_of(model).named if name != plans_of(model).name],
                dtype=recipe.dtype,
            ),
            reference=settings.reference,
            extractor=extractor,
            cache=work.evaluation,
            progress=progress,
        )
        update_file(folder, "eval.json", quality.to_json().encode())
    timing = Timing(recipe.benchmark.batches, recipe.benchmark.dtypes)
    benchmark = _stored(folder / "benchmark.json", BenchmarkReport)
    if benchmark is None or not _timed_as(benchmark, timing, model.device):
        benchmark = verbs.benchmark(
            model,
            against=teacher,
            timing=timing,
            progress=progress,
        )
        update_file(folder, "benchmark.json", benchmark.to_json().encode())
    if teacher.prompts is None:
        names = class_names(teacher)[:-1][:10]
        pictures = [verbs.sample(each, labels=range(len(names))) for each in (teacher, model)]
    else:
        few = teacher.prompts.rows(slice(0, 10))
        names = [f"prompt {number}" for number in range(len(few))]
        pictures = [verbs.sample(each, rows=few) for each in (teacher, model)]
    samples = samples_picture(pictures[0], pictures[1], names)
    update_file(folder, "samples.png", samples)
    checks = None
    if recipe.checks is not None:
        checks = run_checks(recipe.checks, flops, quality, baseline)
    with MetricsLog(folder / "metrics.jsonl") as log:
        lines = log.read()
    reports = Reports(flops, quality, benchmark)
    page = report_html(reports, lines, title=f"{recipe.name}: dense and sparse", samples_png=samples)
    update_file(folder, "report.html", page.encode())
    origin = read_provenance(folder)
    card = model_card(
        recipe.name,
        reports,
        plan=model.plan,
        base_model=recipe.model,
        repository=official_files(recipe.model).repository if recipe.model in official_names() else None,
        provenance={key: getattr(value, "text", str(value)) for key, value in origin if value is not None},
    )
    update_file(folder, "README.md", card.encode())
    return RunResult(folder, flops, quality, benchmark, checks)
