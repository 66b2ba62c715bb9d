"""The public verbs: load, convert, distill, evaluate, benchmark, report_flops, inspect, sample, export.

They return values and write files; nothing here prints. ``run``, which strings them together, is in ``runs.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch

from actvar_convert.conversion.activations import Calibration
from actvar_convert.conversion.conversion_memory import estimate_convert, require_memory
from actvar_convert.conversion.converter import conversion_steps, convert_model, made_by_main
from actvar_convert.conversion.search import measure_metrics, plan_model, search_steps, searches
from actvar_convert.cost.flops import FlopsReport, count_flops
from actvar_convert.distillation.data import TokenStore
from actvar_convert.distillation.loop import Upkeep, distill_model, student_print
from actvar_convert.errors import InputError
from actvar_convert.files.bundled import bundled_folder, bundled_names
from actvar_convert.files.export import Exported, export_reference
from actvar_convert.files.inspection import Inspection, inspect_file
from actvar_convert.files.published import official_names
from actvar_convert.files.source import load_any, model_shape, published_inspection, refuse_unneeded, say
from actvar_convert.files.sparse_folder import read_provenance, refuse_foreign, save_sparse
from actvar_convert.measure.evaluation import Evaluation, evaluate_models
from actvar_convert.measure.extractors import FeatureExtractor, bundled_extractor
from actvar_convert.measure.latency import BenchmarkReport, Timing, benchmark_models
from actvar_convert.measure.quality_report import QualityReport
from actvar_convert.models.casting import cast
from actvar_convert.models.infinity.text import TextRows
from actvar_convert.models.model import Model, NoiseSource, differences
from actvar_convert.models.sampling import whole_number, whole_numbers
from actvar_convert.origins import (
    Run,
    Work,
    class_names,
    finished_model,
    recorded_teacher,
    refuse_distilled,
    refuse_other_state,
    require_dense,
)
from actvar_convert.plan import SparsityPlan
from actvar_convert.preflight import Job, conversion_memory, distillation_memory, require_ready
from actvar_convert.recipe.check import check_recipe
from actvar_convert.recipe.load import dump_recipe, load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.recipe.shape import ShapeLike, with_weights
from actvar_convert.show.pictures import picture
from actvar_convert.stores import calibration_store, distillation_store, prompted
from actvar_convert.system import locks
from actvar_convert.system.atomic import write_whole
from actvar_convert.system.device import DtypeLike, limit_threads, pick_device, pick_dtype
from actvar_convert.system.paths import expanded, path_of
from actvar_convert.system.processes import Processes, join
from actvar_convert.system.progress import MetricsLog, Progress, SilentProgress

RecipeLike = str | Path | Recipe


def load(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    shape: ShapeLike = None,
    weights: str | None = None,
    device: str | None = None,
    dtype: DtypeLike | None = None,
    decoder_dtype: DtypeLike | None = None,
    plan: str | None = None,
    recipe: RecipeLike | None = None,
) -> Model:
    """A model, dense or sparse.

    Args:
        source: a bundled name (``fashion``), an official name (``var-d16``), or a file or folder,
            dense or sparse.
        vae: tokenizer file, if the source does not bring its own.
        shape: of dense files what they do not tell, a ``Shape`` or a mapping: ``heads``, ``sides`` (of every scale),
            ``residual_ratio`` (share of the phi convolutions in the tokenizer), ``using_znorm``, ``weights``. Kept in
            what is made from the model.
        weights: which of several weights in a file: the prefix of their names, or a part of it such as ``ema``. By
            default those that were trained, which is logged, not an average of them. The same as ``shape.weights``.
        device: cpu, cuda, cuda:N or mps; by default the GPU if there is one.
        dtype: fp32, bf16 or fp16 (or torch's own), of the transformer; fp32 by default. The tokenizer is in fp32.
        decoder_dtype: of the tokenizer's decoder alone, fp32 by default. The tokens stay the same and the images nearly
            so. For generating: what is converted or saved from such a model keeps the rounded decoder.
        plan: of a sparse model, instead of its default plan.
        recipe: that the model is to be converted by, for which there has to be memory before a weight is read.

    Raises:
        InputError, CheckpointError: what cannot be read, with all problems at once.
    """
    source, vae = expanded(source), expanded(vae)
    target = pick_device(device)
    limit_threads()
    shape = with_weights(shape, weights)
    if recipe is not None:
        _require_memory_by_shape(source, vae, shape, recipe, target)
    decoder = pick_dtype(decoder_dtype, target)
    model = load_any(source, vae=vae, plan=plan, dtype=pick_dtype(dtype, target), shape=shape)
    if decoder != torch.float32:
        model = cast(model, model.dtype, decoder=decoder)
    return model.to(device=target).eval()


def _require_memory_by_shape(
    source: str | Path, vae: str | Path | None, known: ShapeLike, recipe: RecipeLike, device: torch.device
) -> None:
    """Raises InputError if a model that is not loaded yet could not be converted for want of memory.

    What else is wrong with source or recipe is left to those that read them, and say all of it.
    """
    try:
        shape = model_shape(source, vae, shape=known)
        chosen = load_recipe(recipe, config=shape.transformer)
        if shape.tokenizer is None or shape.plans:
            return
        estimate = estimate_convert(shape.transformer, shape.tokenizer, chosen, device=device.type)
    except InputError:
        return
    require_memory(estimate, device)


def convert(
    model: Model,
    *,
    recipe: RecipeLike,
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
    replace: bool = True,
    run: Run | None = None,
    keep: bool = True,
) -> Model:
    """A sparse model from a dense one: calibrated, usable at once without training.

    Args:
        model: the dense model, left as it is unless ``keep`` is False.
        recipe: name, file or Recipe.
        out: folder to write the result to, whole or not at all.
        work: folder in which pyramids and sums are kept as they are made, so an interrupted call goes on. It goes when
            ``out`` is whole; without ``out`` the caller removes it.
        progress: told about every long step.
        replace: a distilled model that ``out`` holds; else it is refused.
        run: what identifies the call, if it is known and everything checked already.
        keep: False: the dense model gives up its weights block by block and is of no use afterwards, so that memory for
            one copy of them is enough, not two.

    Raises:
        RecipeError: the recipe does not fit the model, all problems at once, before any work.
        InputError: less memory is free than the conversion needs, ``out`` holds something else, or another process
            is at it.
    """
    processes = join(model.device)
    progress = progress if progress is not None and processes.main else SilentProgress()
    require_dense(model)
    chosen = load_recipe(recipe, config=model.config)
    if out is not None:
        out = path_of(out)
        refuse_foreign(out)
    if run is None:
        run = Run.of(model, chosen, require_ready(Job.of(model, chosen, processes, progress), "convert"))
    place = work if out is None else out
    if place is None:
        return _convert(model, run, None, None, progress, processes, keep)
    keeping = Work.of(path_of(place), work)
    with keeping.owned(processes) as begins:
        if out is not None and not replace:
            refuse_distilled(out)
        kept = None if work is None else keeping
        sparse = _convert(model, run, out, kept, progress, processes, keep)
        if begins and out is not None and processes.main:
            locks.clear(keeping.folder)
    return sparse


def _convert(
    model: Model,
    run: Run,
    out: Path | None,
    work: Work | None,
    progress: Progress,
    processes: Processes,
    keep: bool,
) -> Model:
    config, chosen = model.config, run.recipe
    model = prompted(model, chosen)
    require_memory(conversion_memory(model, chosen, keep=keep), model.device)
    pyramids = sums = None
    if work is not None:
        pyramids, sums = work.calibration(run), work.search(run)
    store = calibration_store(model, chosen, run.images, path=pyramids, progress=progress, processes=processes)

    calibration = Calibration(store.tokens, store.condition, chosen.calibration.batch)
    planned = None
    reporter = progress if searches(chosen) else SilentProgress()
    with reporter.task("searching for a plan", search_steps(config, chosen)) as task:
        metrics = None
        if searches(chosen):
            state = sums if processes.count == 1 else None
            metrics = measure_metrics(
                model, chosen, calibration, state=state, processes=processes, on_step=task.advance
            )
        if processes.main:
            planned = plan_model(model, chosen, calibration, metrics=metrics, on_step=task.advance)
        del metrics

    def make() -> Model:
        assert planned is not None
        with progress.task("converting blocks", conversion_steps(config, chosen)) as task:
            return convert_model(model, planned, chosen, calibration, keep=keep, on_block=task.advance)

    sparse = made_by_main(make, model, processes)
    sparse.origin = {}
    if out is not None and processes.main:
        origin = run.origin.model_copy(update={"run": None})
        save_sparse(sparse, out, provenance=origin, recipe_text=dump_recipe(chosen))
    return sparse


def distill(
    model: Model,
    *,
    teacher: Model | None = None,
    recipe: RecipeLike,
    out: str | Path,
    work: str | Path | None = None,
    progress: Progress | None = None,
    run: Run | None = None,
    shard: bool = False,
    replace: bool = True,
) -> Model:
    """Two-stage distillation of a converted model, in place; goes on where an interrupted call stopped.

    If ``out`` holds the result of the same call already, the model takes its weights from there.

    Processes that a launcher started together share every batch, and end with the same model.

    Args:
        model: the converted model.
        teacher: the dense model it came from; the recorded one by default.
        recipe: name, file or Recipe.
        out: folder to write the result to.
        work: folder in which samples and state wait until ``out`` is whole, ``OUT.work`` beside it by default.
        progress: told about every long step.
        run: what identifies the call, if it is known and everything checked already.
        shard: split the student over the processes while it trains, instead of a copy in each.
        replace: a distilled model of another call that ``out`` holds; else it is refused.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; the same call goes on.
        Diverged: too many steps in a row gave no finite gradient; ``out`` is as it was.
        CheckpointError: the state in ``work`` belongs to another recipe, teacher or converted model.
        InputError: the teacher has another shape, the student cannot be split, less memory is free than the
            distillation needs, images are not there, weights are not in fp32, ``out`` or ``work`` holds something
            else, or another process is at it.
    """
    processes = join(model.device, shard=shard)
    progress = progress if progress is not None and processes.main else SilentProgress()
    if not model.is_sparse:
        raise InputError("this model is dense; convert it first (actvar convert MODEL --out DIR)")
    chosen = load_recipe(recipe)
    check_recipe(chosen, model.config)
    teacher = recorded_teacher(model) if teacher is None else teacher
    require_dense(teacher)
    unlike = differences(model.config, teacher.config)
    if unlike:
        raise InputError("the model was not made from this teacher; give the dense model that it came from:", unlike)
    if (model.dtype, teacher.dtype) != (torch.float32, torch.float32):
        raise InputError(
            f"the weights are {model.dtype} (teacher: {teacher.dtype}), and a training moves them in fp32; load both "
            "without a dtype. The recipe's dtype is that of the computing."
        )
    folder = path_of(out)
    refuse_foreign(folder)
    if run is None:
        images = require_ready(Job.of(teacher, chosen, processes, progress), "train")
        teacher = prompted(teacher, chosen)
        run = Run.of(teacher, chosen, images)
    keeping = Work.of(folder, work)
    with keeping.owned(processes):
        _distill(model, teacher, run, keeping, progress, processes, replace)
    return model


def _distill(
    model: Model,
    teacher: Model,
    run: Run,
    work: Work,
    progress: Progress,
    processes: Processes,
    replace: bool,
) -> None:
    chosen, folder = run.recipe, work.out
    student = processes.from_main(student_print(model) if processes.main else "")
    if _take_finished(model, folder, run.key, student):
        progress.say(f"{folder} holds the result of this distillation already")
        if processes.main:
            work.clear(run)
        return
    if not replace:
        refuse_distilled(folder)
    require_memory(distillation_memory(teacher, chosen, processes), model.device)
    refuse_other_state(work, run.key)
    if chosen.distill.stage1.steps or chosen.distill.stage2.steps:
        tokens = work.tokens(run)
        store = distillation_store(teacher, chosen, run.images, path=tokens, progress=progress, processes=processes)
    else:
        nothing = teacher.balanced(1)
        store = TokenStore(teacher, teacher.generate_tokens(nothing)[:0], nothing.rows(slice(0)))
    log = MetricsLog(work.metrics) if processes.main else None
    with log or nullcontext():
        distill_model(
            model,
            teacher,
            chosen,
            store,
            Upkeep(progress, log, work.state, run.key, student),
            processes=processes,
        )
    if processes.main:
        save_sparse(
            model,
            folder,
            provenance=run.origin.model_copy(update={"distilled": True, "student": student}),
            recipe_text=dump_recipe(chosen),
            extra_files={"metrics.jsonl": work.metrics.read_bytes()},
        )
    processes.wait()
    if processes.main:
        work.clear(run)


def _take_finished(model: Model, folder: Path, fingerprint: str, student: str) -> bool:
    """Gives a model the weights of the finished run in ``folder``, if that began with it or is it."""
    found = finished_model(folder, fingerprint)
    if found is None or (student != read_provenance(folder).student and student != student_print(found)):
        return False
    model.transformer.load_state_dict(found.transformer.state_dict())
    return True


def evaluate(
    model: Model,
    *,
    teacher: Model | None = None,
    settings: Evaluation | None = None,
    reference: str | Path | None = None,
    extractor: FeatureExtractor | None = None,
    rows: TextRows | str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> QualityReport:
    """Quality of a model against its teacher, both generating with the same seeds in this run.

    Args:
        model: sparse, or any other of the teacher's shape.
        teacher: the dense model; the recorded one by default.
        settings: number of images, seeds and the rest.
        reference: real images, a folder or an .npz with mu and sigma: measures in Inception features (needs the
            ``inception`` extra). By default the bundled classifier measures, for models of its kind of images; for
            others there is no FID, and of images only their distance to the teacher's is measured.
        extractor: what ``extractor_for`` made of ``reference``, if it is at hand already.
        rows: text rows of the prompts, or their file, of models that make images of text.
        cache: folder in which features are kept while they are made.
        progress: told about every long step.

    Raises:
        InputError: settings that contradict each other or cannot be measured, a teacher that is not at hand, or a cache
            that another process is filling.
    """
    settings = settings or Evaluation()
    images = settings.images
    if not images and reference is not None:
        raise InputError("reference: no image is compared with it if images is 0; leave one of the two out")
    teacher = recorded_teacher(model) if teacher is None else teacher
    if teacher.is_sparse:
        raise InputError("the teacher is sparse, and quality is measured against a dense model; give that one")
    teacher = _prompted(teacher, rows)
    if extractor is None and images:
        try:
            extractor = extractor_for(teacher, reference)
        except InputError:
            if reference is not None:
                raise
    folder = None if cache is None else path_of(cache)
    with nullcontext() if folder is None else locks.owned(folder, join(model.device)):
        report = evaluate_models(model, teacher, settings, extractor=extractor, progress=progress, cache_dir=folder)
    if not images or extractor is None or reference is not None or teacher.origin.get("name") in bundled_names():
        return report
    doubt = (
        f"the {extractor.name} compares with the images it was trained on; for a model of other images that means "
        "nothing: name real ones with --reference"
    )
    return report.model_copy(update={"notes": (*report.notes, doubt)})


def _prompted(model: Model, rows: TextRows | str | Path | None) -> Model:
    """A model with the prompts that it is to make images of, if it reads text.

    Raises:
        InputError: it reads text and has none, or reads none and is given some, or they do not fit.
    """
    reads = getattr(model.family, "reads_text", False)
    if rows is not None and not reads:
        raise InputError("rows: the model makes no images of text; leave it out")
    if rows is not None:
        return model.with_prompts(rows if isinstance(rows, TextRows) else TextRows.load(path_of(rows)))
    if reads and model.prompts is None:
        raise InputError(
            f"rows: none given, and {model.family.name} makes images of text; give the text rows of prompts (--rows "
            "FILE)"
        )
    return model


def extractor_for(model: Model, reference: str | Path | None = None) -> FeatureExtractor:
    """What judges a model's images: Inception if real images are named, else a bundled classifier that knows them.

    Raises:
        InputError: Inception is not installed, or no bundled classifier knows such images.
    """
    if reference is not None:
        from actvar_convert.measure.extractors import InceptionExtractor

        size = model.tokenizer.config.image_size
        return InceptionExtractor(path_of(reference), image_size=size, device=str(model.device))
    problems = []
    for name in bundled_names():
        extractor = bundled_extractor(name)
        found = extractor.problems(model)
        if not found:
            return extractor
        problems += found
    raise InputError(
        "no bundled classifier can judge this model's images; name real images with --reference (evaluate) or "
        "evaluate.reference (recipe), a folder or an .npz with mu and sigma",
        problems,
    )


def benchmark(
    model: Model,
    *,
    against: Model | None = None,
    timing: Timing | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Seconds per batch of a model, alternating with ``against``; by component too with ``Timing.split``.

    A sparse model loaded from a folder is compared with its recorded source unless told otherwise.
    """
    if against is None and model.is_sparse and "path" in model.origin:
        against = recorded_teacher(model)
    return benchmark_models(model, against, timing or Timing(), progress=progress)


def report_flops(
    model: Model | str | Path,
    *,
    vae: str | Path | None = None,
    shape: ShapeLike = None,
    weights: str | None = None,
    guidance: bool = True,
) -> FlopsReport:
    """FLOPs per image, dense and sparse. Of what is not loaded yet no weights are read.

    Args:
        model: a model, or what ``load`` takes; an official name needs neither weights nor network. Without a tokenizer
            the decoder is left out.
        vae, shape, weights: see ``load``.
        guidance: with classifier-free guidance.
    """
    if not isinstance(model, Model):
        found = model_shape(expanded(model), expanded(vae), shape=with_weights(shape, weights))
        say(model, found.notes)
        return count_flops(found.transformer, found.tokenizer, found.plans, found.default_plan, guidance=guidance)
    plans: Mapping[str, SparsityPlan] | None = None
    default = None
    if model.plans is not None:
        plans, default = model.plans.named, model.plans.name
    return count_flops(model.config, model.tokenizer.config, plans, default, guidance=guidance)


def inspect(
    path: str | Path,
    *,
    vae: str | Path | None = None,
    shape: ShapeLike = None,
    weights: str | None = None,
    values: bool = False,
) -> Inspection:
    """What is in a file or folder, without loading it; see ``Inspection``.

    Args:
        path: file or folder, a bundled name, or an official one: of that the published shape, no file is read.
        vae: tokenizer file, to check that it fits.
        shape, weights: see ``load``.
        values: also read every value and count those that are NaN or infinite.
    """
    path, vae = expanded(path), expanded(vae)
    name = path if isinstance(path, str) else ""
    shape = with_weights(shape, weights)
    refuse_unneeded(path, vae, shape)
    if name in official_names():
        if values or vae is not None:
            raise InputError(f"{name} is a name, and no file of it is read here; give the file that is to be looked at")
        return published_inspection(name)
    source = bundled_folder(name) if name in bundled_names() else path
    return inspect_file(source, vae, values=values, shape=shape)


def sample(
    model: Model,
    *,
    out: str | Path | None = None,
    labels: Sequence[int] | None = None,
    rows: TextRows | str | Path | None = None,
    per_class: int = 1,
    seed: int = 0,
    cfg: float | None = None,
    tau: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    chunk: int = 64,
    compile: bool = False,
    noise: NoiseSource = "device",
    progress: Progress | None = None,
) -> torch.Tensor:
    """Images [B, 3, H, W] in [0, 1] on the CPU: ``per_class`` of every label or prompt, going through them in turn.

    Args:
        model: dense or sparse.
        out: PNG to write, a column per label or prompt.
        labels: classes, -1 for no class; the first ten by default.
        rows: text rows of prompts, or their file, in place of labels, for a model that makes images of text.
        cfg, tau, top_k, top_p: see Sampling; the model's own values by default.
        per_class, seed, chunk, compile, noise: see ``Model.generate``.
        progress: told about the images.

    Raises:
        InputError: a value that makes no sense, or a file that is no place for a PNG; before any work.
    """
    model, classes = _prompted(model, rows), model.family.classes(model.config) or 1
    if labels is None:
        columns = list(range(min(classes, 10) if model.prompts is None else len(model.prompts)))
    elif model.prompts is None:
        columns = whole_numbers("labels", labels, -1, classes)
    else:
        raise InputError("labels: the model makes images of text, and knows no classes; leave labels out")
    per_class = whole_number("per_class", per_class, 1)
    if not columns:
        raise InputError("labels: none given. Give at least one class, or leave labels out.")
    place = None if out is None else path_of(out)
    if place is not None and (place.is_dir() or place.suffix.lower() not in ("", ".png")):
        raise InputError(f"{place} is no name for the picture, a PNG file. Give a name that ends in .png.")
    with (progress or SilentProgress()).task("generating", len(columns) * per_class) as task:
        images = model.generate(
            columns * per_class if model.prompts is None else model.balanced(len(columns) * per_class),
            seed=seed,
            sampling=model.sampling_with(cfg, top_k, top_p, tau),
            chunk=chunk,
            compile=compile,
            noise=noise,
            on_images=task.advance,
        ).cpu()
    if place is not None:
        names = class_names(model) if model.prompts is None else [f"prompt {column}" for column in columns]
        write_whole(place, picture({"": images}, [names[label] for label in columns]))
    return images


def export(
    model: Model | str | Path,
    *,
    out: str | Path,
    vae_out: str | Path | None = None,
    format: Literal["reference"] = "reference",
) -> Exported:
    """Writes a model's dense skeleton under the official names, for programs that know VAR alone.

    The export of a conversion that was not distilled equals its source bit by bit.

    Args:
        model: a model, or what ``load`` takes.
        out: file of the transformer, ending in .safetensors or .pth; nothing is replaced.
        vae_out: file of the tokenizer, if it is wanted.
        format: the reference's layout is the only one.

    Returns:
        the files, and what a dense model has no place for.
    """
    if format != "reference":
        raise InputError(f"format {format!r} is unknown; give reference")
    loaded = model if isinstance(model, Model) else load(model, device="cpu")
    return export_reference(loaded, path_of(out), None if vae_out is None else path_of(vae_out))
