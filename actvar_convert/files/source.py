"""A model from whatever a person names: bundled, published, a sparse folder, a dense file or folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from actvar_convert.errors import InputError
from actvar_convert.files.bundled import bundled_names, load_bundled
from actvar_convert.files.dense import DTypeChoice, load_dense
from actvar_convert.files.infer import Overrides
from actvar_convert.files.locate import is_sparse_folder
from actvar_convert.files.official import fetch_official, official_names
from actvar_convert.files.sparse_folder import load_sparse
from actvar_convert.files.tensors import require_exists
from actvar_convert.models.model import VARModel


def load_any(
    source: str | Path,
    vae: str | Path | None = None,
    plan: str | None = None,
    *,
    heads: int | None = None,
    residual_ratio: float | None = None,
    sides: Sequence[int] | None = None,
    dtype: DTypeChoice = None,
    revision: str | None = None,
) -> VARModel:
    """A model from its name or path; dense and sparse models are used alike.

    A plain name means a bundled or published model even where a file has that name; write ``./NAME`` for the file.

    Args:
        source: bundled name ("fashion"), published name ("var-d16"), sparse folder, dense file or folder.
        vae: tokenizer of a dense source.
        plan: of a sparse source, instead of its default.
        heads, residual_ratio, sides: of a dense file or folder that does not tell, see Overrides.
        dtype: of the transformer; None: float32; "keep" (dense files): as stored.
        revision: of a published name, the commit of its repository; the latest by default.

    Raises:
        InputError: nothing has this name; the message proposes what has a similar one.
        CheckpointError: see load_dense and load_sparse.
    """
    name = source if isinstance(source, str) else ""
    path = Path(source)
    sparse = is_sparse(source)
    refuse_unneeded(source, vae, Overrides(heads, residual_ratio, sides))
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
        model = load_dense(fetched.transformer, tokenizer, dtype=dtype)
        model.origin = {"name": name, "revision": fetched.revision, **model.origin}
        return model
    require_known(source)
    if sparse:
        return load_sparse(path, plan, dtype=None if dtype == "keep" else dtype)
    return load_dense(path, vae, heads=heads, residual_ratio=residual_ratio, sides=sides, dtype=dtype)


def is_sparse(source: str | Path) -> bool:
    """Whether a source is a sparse folder, and not a name."""
    named = isinstance(source, str) and source in (*bundled_names(), *official_names())
    return not named and is_sparse_folder(Path(source))


def refuse_unneeded(source: str | Path, vae: str | Path | None, overrides: Overrides) -> None:
    """Raises InputError where a tokenizer or a shape is given for a source that brings its own."""
    bundled, sparse = isinstance(source, str) and source in bundled_names(), is_sparse(source)
    if vae is not None and (sparse or bundled):
        raise InputError(f"{source} brings its own tokenizer. Leave vae out.")
    known = sparse or bundled or (isinstance(source, str) and source in official_names())
    if overrides.given and known:
        raise InputError(f"the shape of {source} is known. Leave {' and '.join(overrides.given)} out.")


def require_known(source: str | Path) -> None:
    """Raises InputError where nothing exists under this path; the message proposes names and files that look alike."""
    if isinstance(source, Path) or Path(source).exists() or Path(source).name != source or "." in source:
        require_exists(Path(source))
        return
    names = [*bundled_names(), *official_names()]
    folder = Path.cwd()
    near = difflib.get_close_matches(source.lower(), [*names, *(entry.name for entry in folder.iterdir())], n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise InputError(
        f"{source!r} is neither the name of a model nor a file or folder in {folder}. {hint}Names: {', '.join(names)}."
    )
