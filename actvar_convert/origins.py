"""Where a model comes from: its source and teacher on record, and the run that made it or is still at it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from actvar_convert.errors import CheckpointError, InputError, explain_os_errors
from actvar_convert.files.bundled import bundled_config, bundled_names
from actvar_convert.files.run_state import check_run_state, fingerprint_of
from actvar_convert.files.source import load_any
from actvar_convert.files.sparse_folder import (
    Provenance,
    checked_config,
    is_sparse_folder,
    load_sparse,
    provenance_of,
    read_provenance,
)
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model
from actvar_convert.recipe.schema import Recipe, deciding
from actvar_convert.stores import RecipeImages, require_images
from actvar_convert.system import locks
from actvar_convert.system.atomic import remove_leftovers
from actvar_convert.system.device import DtypeLike, pick_device, pick_dtype
from actvar_convert.system.paths import path_of
from actvar_convert.system.processes import ALONE, Processes

STATE = "state.safetensors"
"""File of an unfinished distillation in its ``work_folder``."""

KEPT = (
    *(".*", STATE, "metrics.jsonl", "converted", "evaluation", "calibration-*.bin", "search-*", "tokens-*.bin"),
    "[0-9a-f]" * 40 + ".kept",
)
"""Glob patterns of all that is kept of unfinished work; the last are features of a sweep."""


@dataclass(frozen=True)
class Run:
    """One recipe on one teacher: what identifies it. The teacher is hashed here, once for all who ask.

    Attributes:
        recipe: resolved.
        start: identifies the conversion. key: the conversion and the training.
        origin: where the result comes from: the recipe's name, the source's files by hash as they were before the work.
        images: that the recipe chooses, if it names some, by their content as it was before the work.
    """

    recipe: Recipe
    start: str
    key: str
    origin: Provenance
    images: RecipeImages | None = None

    @classmethod
    def of(cls, teacher: Model, recipe: Recipe, images: RecipeImages | None = None) -> Run:
        """What both depend on: the teacher, its sampling, the settings that decide them, images by their content.

        Args:
            images: what ``require_images`` gave for the recipe, if that was asked already.

        Raises:
            InputError: the recipe names images that cannot be used.
        """
        images = images or require_images(recipe, teacher.family.classes(teacher.config))
        prints = [each.fingerprint for each in images or ()]
        weights = state_fingerprint(teacher)
        tokenizer = teacher.tokenizer.config.model_dump_json()
        around = (weights, tokenizer, json.dumps(teacher.sampling.settings), teacher.origin.get("shape", ""))
        around = (*around, *teacher.drawn_on.values())
        start, key = (
            fingerprint_of(*around, deciding(recipe, *phases), *prints[: len(phases)])
            for phases in (("convert",), ("convert", "train"))
        )
        origin = provenance_of(
            teacher.origin, teacher.moments, recipe=recipe.name, teacher_fingerprint=weights, run=key
        )
        return cls(recipe, start, key, origin, images)


@dataclass(frozen=True)
class Work:
    """Where the unfinished work on a result is kept, file by file.

    Attributes:
        out: the folder that is to hold the result.
        folder: where the work is kept until then.
    """

    out: Path
    folder: Path

    @classmethod
    def of(cls, out: Path, named: str | Path | None = None) -> Work:
        """The folder that is named, else ``OUT.work`` beside the result.

        Raises:
            InputError: what is named is no folder, or holds something else.
        """
        if named is None:
            return cls(out, work_folder(out))
        folder = path_of(named)
        with explain_os_errors("keep unfinished work in", folder):
            entries = sorted(folder.iterdir()) if folder.exists() else []
        other = [entry.name for entry in entries if not any(fnmatch(entry.name, pattern) for pattern in KEPT)]
        if other:
            raise InputError(
                f"{folder} is to hold unfinished work alone, for all of it is removed at the end, and it holds "
                f"{other[0]}. Name an empty folder, or one that is not there yet (--work)."
            )
        return cls(out, folder)

    @contextmanager
    def owned(self, processes: Processes = ALONE) -> Iterator[bool]:
        """Makes this process the one that works on a result; see ``locks.owned``."""
        with locks.owned(self.folder, processes, option="--work") as begins:
            if begins and processes.main:
                with explain_os_errors("write", self.out):
                    remove_leftovers(self.out)
            yield begins

    def clear(self, run: Run) -> None:
        """Removes everything, for the run is over, unless a training of another run waits there."""
        if self.state.exists():
            try:
                check_run_state(self.state, run.key)
            except CheckpointError:
                return
        locks.clear(self.folder, last=STATE)

    @property
    def state(self) -> Path:
        """Of the distillation."""
        return self.folder / STATE

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def converted(self) -> Path:
        """The sparse folder before the training."""
        return self.folder / "converted"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    def calibration(self, run: Run) -> Path:
        """Pyramids that a conversion measures on."""
        return self.folder / f"calibration-{run.start[:12]}.bin"

    def search(self, run: Run) -> Path:
        """Sums of gradients of the search for a plan."""
        return self.folder / f"search-{run.start[:12]}"

    def tokens(self, run: Run) -> Path:
        """Pyramids that a distillation replays."""
        return self.folder / f"tokens-{run.key[:12]}.bin"


def recorded_teacher(model: Model, *, device: str | None = None, dtype: DtypeLike | None = None) -> Model:
    """The dense model that a sparse folder records as its source.

    Raises:
        InputError: the model was not loaded from a sparse folder, or its source is not recorded or not there.
        CheckpointError: the source has changed since.
    """
    folder = model.origin.get("path")
    if not model.is_sparse or folder is None:
        raise InputError("this model records no teacher; name the dense model (--teacher)")
    recorded = read_provenance(folder)
    source = recorded.source if recorded.name is None else recorded.name
    if source is None:
        raise InputError(f"{folder} does not record its source; name the dense model (--teacher)")
    try:
        teacher = load_any(
            source,
            _recorded_vae(recorded),
            shape=recorded.shape,
            revision=recorded.revision,
        ).eval()
    except CheckpointError:
        raise
    except InputError as error:
        text = f"the recorded teacher of {folder} is not at hand; name the dense model (--teacher). {error}"
        raise InputError(text) from error
    expected = (recorded.model_extra or {}).get("teacher_fingerprint")
    ours, theirs = ((each.config, each.tokenizer.config) for each in (model, teacher))
    differing = "shape differs" if ours != theirs else "weights differ"
    if ours != theirs or (expected is not None and expected != state_fingerprint(teacher)):
        raise CheckpointError(
            f"{source} is no longer the model that {folder} was made from, its {differing}; name the right one "
            "(--teacher)"
        )
    target = pick_device(device) if device is not None else model.device
    teacher.to(target)
    teacher.transformer.to(model.dtype if dtype is None else pick_dtype(dtype, target))
    return teacher


def _recorded_vae(recorded: Provenance) -> str | None:
    """The tokenizer's file to load a recorded source with; None if the source brings its own.

    With a published name that is the file that was given beside it, if it is still there, else the published one.
    """
    if recorded.name in bundled_names() or recorded.vae is None:
        return None
    return recorded.vae if recorded.name is None or Path(recorded.vae).exists() else None


def class_names(model: Model) -> list[str]:
    """Names of the classes: those of the bundled model if it is the source, numbers elsewhere; null last."""
    classes = model.family.classes(model.config) or 0
    name = model.origin.get("name")
    if name is None and model.is_sparse and "path" in model.origin:
        name = read_provenance(model.origin["path"]).name
    names = bundled_config(name).get("classes", []) if name in bundled_names() else []
    return [*(names if len(names) == classes else map(str, range(classes))), "no class"]


def require_dense(model: Model) -> None:
    """Raises InputError for a model that is sparse already."""
    if model.is_sparse:
        raise InputError("this model is sparse already; give the dense model that it came from")


def work_folder(out: Path) -> Path:
    """Where an unfinished run keeps its samples and state."""
    named = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    return named.with_name(named.name + ".work")


def refuse_distilled(folder: Path) -> None:
    """Raises InputError if a folder that nobody named holds a model that was trained, or one that cannot be read."""
    if not is_sparse_folder(folder):
        return
    try:
        recorded = checked_config(folder).provenance.model_extra or {}
    except CheckpointError as error:
        raise InputError(f"{folder} holds a model already. To replace it, name it with --out. {error}") from error
    if recorded.get("distilled"):
        raise InputError(
            f"{folder} holds a distilled model. Choose another folder with --out; --out {folder} replaces it."
        )


def refuse_other_state(work: Work, fingerprint: str) -> None:
    """Checks that an unfinished distillation, if there is one, is the one with this fingerprint.

    Raises:
        CheckpointError: it belongs to another recipe or teacher, or is damaged.
    """
    if work.state.exists():
        check_run_state(work.state, fingerprint)


def finished_model(folder: Path, fingerprint: str, *, distilled: bool = True) -> Model | None:
    """The model in a folder, on the CPU, if it is what the run with this fingerprint makes; None for anything else.

    Args:
        distilled: the run's result; else its model before the training.

    Raises:
        CheckpointError: the folder is a damaged one of this package.
    """
    if not (folder / "config.json").exists():
        return None
    recorded = read_provenance(folder).model_extra or {}
    if recorded.get("run") != fingerprint or bool(recorded.get("distilled")) != distilled:
        return None
    return load_sparse(folder)
