"""A model, or its shape, from whatever a person names: bundled, published, a sparse folder, a dense file or folder."""

from __future__ import annotations

import difflib
import errno
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actvar_convert.errors import CheckpointError, InputError, explained, os_error_number
from actvar_convert.files.bundled import bundled_config, bundled_names, load_bundled
from actvar_convert.files.dense import AS_VAE, DTypeChoice, load_dense
from actvar_convert.files.inspection import Inspection, describe, dtype_name, inspect_file
from actvar_convert.files.published import TOKENIZER_FILE as TOKENIZER_FILE
from actvar_convert.files.published import official_config, official_files, official_names
from actvar_convert.files.skeleton import empty_backbone
from actvar_convert.files.sparse_folder import is_sparse_folder, load_sparse, read_sparse_config
from actvar_convert.files.tensors import require_exists
from actvar_convert.models.infinity.config import InfinityConfig
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.shape import Shape, ShapeLike, shape_of

_LOG = logging.getLogger(__name__)

_CACHE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class ModelShape(NamedTuple):
    """Configurations of a model.

    Attributes:
        tokenizer: None if none lies with the transformer.
        plans, default_plan: of a sparse model; none of a dense one.
        line: the model in words.
        notes: what was inferred or chosen, a sentence each.
    """

    transformer: Any
    tokenizer: Any
    plans: Mapping[str, SparsityPlan]
    default_plan: str | None
    line: str
    notes: tuple[str, ...] = ()


def load_any(
    source: str | Path,
    vae: str | Path | None = None,
    plan: str | None = None,
    *,
    shape: ShapeLike = None,
    dtype: DTypeChoice = None,
    revision: str | None = None,
) -> Model:
    """A model from its name or path; dense and sparse models are used alike.

    What was inferred or chosen is logged as a warning, which goes to stderr unless the program says otherwise.

    A plain name means a bundled or published model even if a file has that name; write ``./NAME`` for the file.

    Args:
        source: bundled name ("fashion"), published name ("var-d16"), sparse folder, dense file or folder.
        vae: tokenizer of a dense source.
        plan: of a sparse source, instead of its default.
        shape: of a dense file or folder what its files do not tell, see Shape.
        dtype: of the transformer; None: float32; "keep" (dense files): as stored.
        revision: of a published name, the commit of its repository; the latest by default.

    Raises:
        InputError: nothing has this name; the message proposes what has a similar one.
        CheckpointError: see load_dense and load_sparse.
    """
    model = _load(source, vae, plan, shape, dtype, revision)
    say(source, model.notes)
    return model


def say(source: str | Path, notes: Iterable[str]) -> None:
    """Logs what was inferred or chosen of a model."""
    for note in notes:
        _LOG.warning("%s: %s", source, note)


def _load(
    source: str | Path,
    vae: str | Path | None,
    plan: str | None,
    shape: ShapeLike,
    dtype: DTypeChoice,
    revision: str | None,
) -> Model:
    name = source if isinstance(source, str) else ""
    path = Path(source)
    sparse = is_sparse(source)
    refuse_unneeded(source, vae, shape_of(shape))
    if plan is not None and not sparse:
        raise InputError(f"{source} is not a sparse folder and has no plan {plan!r}. Leave plan out.")
    if name in bundled_names():
        model = load_bundled(name)
        if isinstance(dtype, torch.dtype):
            model.transformer.to(dtype)
        return model
    if name in official_names():
        fetched = fetch_official(name, tokenizer=vae is None, revision=revision)
        tokenizer = fetched.tokenizer if vae is None else vae
        model = load_dense(fetched.transformer, tokenizer, shape=shape, dtype=dtype)
        model.origin = {"name": name, "revision": fetched.revision, **model.origin}
        return model
    require_known(source)
    if sparse:
        return load_sparse(path, plan, dtype=None if dtype == "keep" else dtype)
    return load_dense(path, vae, shape=shape, dtype=dtype)


def model_shape(
    source: str | Path,
    vae: str | Path | None = None,
    *,
    shape: ShapeLike = None,
) -> ModelShape:
    """Shape of what ``load_any`` would load, from a configuration or from names and shapes of tensors.

    Args:
        source, vae, shape: as for ``load_any``; a published name needs neither file nor network.

    Raises:
        InputError: nothing has this name.
        CheckpointError: no VAR, or one that cannot be loaded, as far as names and shapes tell.
    """
    name = source if isinstance(source, str) else ""
    sparse = is_sparse(source)
    refuse_unneeded(source, vae, shape_of(shape))
    if vae is not None:
        require_exists(Path(vae))
    if name in official_names():
        transformer, tokenizer = official_config(name, shape_of(shape))
        return ModelShape(transformer, tokenizer, {}, None, _described(transformer, torch.float32)[0])
    if name in bundled_names():
        stored = bundled_config(name)
        transformer, tokenizer = TransformerConfig(**stored["transformer"]), TokenizerConfig(**stored["tokenizer"])
        return ModelShape(transformer, tokenizer, {}, None, _described(transformer, torch.float16)[0])
    require_known(source)
    found = inspect_file(source, vae, shape=shape)
    if found.config is None:
        raise CheckpointError(f"{source} is no VAR: {found.line}")
    if not found.complete:
        missing = [f"{tensor} is missing" for tensor in found.missing]
        unknown = [f"{tensor} is unknown" for tensor in found.unexpected]
        problems = [*missing, *found.mis_shaped, *unknown, *found.disagreements]
        more = [f"... and {len(problems) - 3} more"] if len(problems) > 3 else []
        raise CheckpointError(f"{source} cannot be loaded: {'; '.join([*problems[:3], *more])}")
    plans = read_sparse_config(Path(source)).plans if sparse else {}
    notes = () if sparse else found.notes
    return ModelShape(found.config, found.tokenizer, plans, found.default_plan, found.line, notes)


def published_inspection(name: str) -> Inspection:
    """What an inspection of a published model's files would say of its shape; none of them is needed.

    Raises:
        InputError: no published model has this name.
    """
    transformer, tokenizer = official_config(name)
    line, parameters = _described(transformer, torch.float32)
    return Inspection(
        path=name,
        kind="infinity" if isinstance(transformer, InfinityConfig) else "var",
        line=line,
        config=transformer,
        tokenizer=tokenizer,
        parameters=parameters,
        dtype=dtype_name(torch.float32),
        notes=("this is the published shape of that name; no file was read",),
    )


def is_sparse(source: str | Path) -> bool:
    """Whether a source is a sparse folder, and not a name."""
    named = isinstance(source, str) and source in (*bundled_names(), *official_names())
    return not named and is_sparse_folder(Path(source))


def refuse_unneeded(source: str | Path, vae: str | Path | None, shape: Shape) -> None:
    """Raises InputError if a tokenizer or a shape is given for a source that brings its own."""
    bundled, sparse = isinstance(source, str) and source in bundled_names(), is_sparse(source)
    if vae is not None and (sparse or bundled):
        raise InputError(f"{source} brings its own tokenizer. Leave vae out.")
    official = isinstance(source, str) and source in official_names()
    needless = [name for name in shape.given if name != "schedule" or not official]
    if needless and (sparse or bundled or official):
        raise InputError(f"the shape of {source} is known. Leave {' and '.join(needless)} out.")


def require_known(source: str | Path) -> None:
    """Raises InputError if nothing exists under this path; the message proposes names and files that look alike."""
    if isinstance(source, Path) or os.path.lexists(source) or Path(source).name != source or "." in source:
        require_exists(Path(source))
        return
    names = [*bundled_names(), *official_names()]
    folder = Path.cwd()
    near = difflib.get_close_matches(source.lower(), [*names, *(entry.name for entry in folder.iterdir())], n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise InputError(
        f"{source!r} is neither the name of a model nor a file or folder in {folder}. {hint}Names: {', '.join(names)}."
    )


class OfficialFiles(NamedTuple):
    """Where the hub's files of a model lie on this machine, and the revision (commit) they are of."""

    transformer: Path
    tokenizer: Path | None
    revision: str


def fetch_official(name: str, tokenizer: bool = True, revision: str | None = None) -> OfficialFiles:
    """Downloads the files of a published model, or takes them from the cache.

    Args:
        name: one of ``official_names()``.
        tokenizer: whether its tokenizer is wanted too; it is of the same revision.
        revision: commit of the repository; the latest by default.

    Raises:
        InputError: no such model, or the hub cannot be reached and the files are not in the cache.
    """
    official_config(name)
    files = official_files(name)
    weights = _fetch(name, files.weights, revision)
    revision = weights.parent.name  # the cache keeps files under snapshots/COMMIT
    return OfficialFiles(weights, _fetch(name, files.vae, revision) if tokenizer else None, revision)


def _fetch(name: str, file: str, revision: str | None) -> Path:
    """A file, or a folder whose name ends in a slash, of the repository of a published model."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    files = official_files(name)
    repository = files.repository
    try:
        if file.endswith("/"):
            snapshot = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=f"{file}*")
            return Path(snapshot) / file
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # of which class depends on the client's version: of requests, httpx, hf_xet, ...
        of = f" at revision {revision[:12]}" if revision else ""
        needed = f"{name} needs {file} of huggingface.co/{repository}{of}"
        cause, place = os_error_number(error), getattr(error, "filename", None)
        network = isinstance(error, OSError) and place is None and cause in (errno.EACCES, errno.EPERM)
        if cause in _CACHE_TROUBLE and not network:
            problem = explained("write", place or huggingface_hub.constants.HF_HUB_CACHE, cause, str(error)).message
            raise InputError(f"{needed}: {problem} The variable HF_HOME names the folder of the cache.") from error
        what = type(error).__name__
        if not isinstance(error, HfHubHTTPError | EntryNotFoundError) and str(error):
            what += f": {str(error).splitlines()[0][:200]}"
        raise InputError(
            f"{needed}, which is not in the cache and cannot be fetched ({what}). Connect to the network (unset "
            f"HF_HUB_OFFLINE if it is set), or download {files.weights} and {files.vae} elsewhere "
            f"and give their paths, the second {AS_VAE}."
        ) from error


def _described(config: Any, dtype: torch.dtype) -> tuple[str, int]:
    """The model in words, and its parameters."""
    parameters = sum(parameter.numel() for parameter in empty_backbone(config).parameters())
    return describe(config, parameters, dtype), parameters
