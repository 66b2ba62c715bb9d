"""The tensors of a dense model, gathered from one or several files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from actvar_convert.errors import CheckpointError
from actvar_convert.files.keymap import Parts, guess_model, split_parts
from actvar_convert.files.locate import AS_VAE, Located, locate
from actvar_convert.files.tensors import read_tensors


class DenseFiles(NamedTuple):
    """The tensors of a dense model, found and named but not yet checked.

    Attributes:
        transformer, tokenizer: tensors by their reference names; None where there is none.
        hints: the config.json of a hub folder; empty without one.
        located: the files they come from.
        rest: names that belong to neither part.
        notes: choices that were made, one sentence each.
    """

    transformer: dict[str, Tensor] | None
    tokenizer: dict[str, Tensor] | None
    hints: Mapping[str, Any]
    located: Located
    rest: list[str]
    notes: list[str]


def read_dense(source: Path, vae: Path | None) -> DenseFiles:
    """Finds and maps the tensors of a dense model without looking at values.

    Raises:
        InputError, CheckpointError: see load_dense.
    """
    located = locate(source, vae)
    parts = _read_parts(located.transformer)
    tokenizer, notes = parts.tokenizer, list(parts.notes)
    separate_file = located.tokenizer is not None and (vae is not None or tokenizer is None)
    if parts.transformer is not None and separate_file and located.tokenizer is not None:
        separate = _read_parts(located.tokenizer)
        if separate.tokenizer is None:
            what = "it is a VAR transformer" if separate.transformer is not None else what_instead(separate.rest)
            raise CheckpointError(
                f"{located.tokenizer} has no VAR tokenizer in it: {what}. Give the VQVAE file {AS_VAE}."
            )
        tokenizer = separate.tokenizer
        notes += separate.notes
        if vae is None:
            notes.append(f"the tokenizer was taken from {located.tokenizer}")
    elif tokenizer is not None:  # in the same file
        located = located._replace(tokenizer=located.transformer)
    return DenseFiles(parts.transformer, tokenizer, located.hints, located, parts.rest, notes)


def _read_parts(path: Path) -> Parts:
    with problems_of(path):
        return split_parts(read_tensors(path))


@contextmanager
def problems_of(path: Path) -> Iterator[None]:
    """Puts the path in front of the message of a CheckpointError that does not name it."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in error.message:
            raise
        raise CheckpointError(f"{path}: {error.message}", error.problems) from error


def what_instead(names: Sequence[str]) -> str:
    """What tensors of these names are, when they are no VAR; a clause."""
    guess = guess_model(names)
    if guess:
        return f"it looks like {guess}"
    if not names:
        return "it holds no named tensors"
    return f"its {len(names)} tensors have unknown names ({', '.join(names[:3])}, ...)"
