"""The state of an unfinished training run: one file that is replaced whole, and checked before it is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from actvar_convert.errors import CheckpointError, explain_os_errors
from actvar_convert.files.tensors import read_metadata, read_tensors, size_of, sniff, write_tensors
from actvar_convert.system.atomic import replacing
from actvar_convert.system.device import require_space

Scalar = bool | int | float | str | None | list["Scalar"] | dict[str, "Scalar"]

_FORMAT = "actvar-run-state/1"


@dataclass(frozen=True)
class RunState:
    """Everything that the rest of a training run depends on.

    Attributes:
        tensors: weights, averages, optimiser state, states of random generators, by any unique names.
        scalars: steps, stage and the like; what JSON can hold.
        fingerprint: identifies recipe and teacher; a run with another one must not be continued.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    fingerprint: str = ""


def fingerprint_of(*parts: str | bytes) -> str:
    """One short string for all that a run depends on (the recipe's text, the teacher's hash, ...)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def save_run_state(path: str | Path, state: RunState) -> None:
    """Writes the state to a file; an earlier state stays until the new one is complete on the disk.

    Raises:
        InputError: the file cannot be written; the earlier state is still there then.
    """
    path = Path(path)
    require_space(path.parent, size_of(state.tensors))
    metadata = {"content": _FORMAT, "fingerprint": state.fingerprint, "scalars": json.dumps(dict(state.scalars))}
    with explain_os_errors("write", path), replacing(path) as temporary:
        write_tensors(temporary, state.tensors, metadata)


def load_run_state(path: str | Path, fingerprint: str) -> RunState:
    """The state in a file, its tensors on the CPU.

    Args:
        path: as given to ``save_run_state``.
        fingerprint: of the run that wants to continue.

    Raises:
        InputError: no such file, or no permission.
        CheckpointError: the file is damaged, or the state belongs to another recipe or teacher.
    """
    scalars = check_run_state(path, fingerprint)
    return RunState(read_tensors(Path(path)), scalars, fingerprint)


def check_run_state(path: str | Path, fingerprint: str) -> dict[str, Scalar]:
    """The scalars of a state that a run may continue from; arguments and errors as for ``load_run_state``."""
    path = Path(path)
    over = f"To start over, delete {path}."
    if sniff(path).format != "safetensors":
        raise CheckpointError(f"{path} is not the state of a run, or was cut short. {over}")
    try:
        metadata = read_metadata(path)
        scalars: dict[str, Scalar] = dict(json.loads(metadata.get("scalars", "")))
    except (CheckpointError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}, the state of an unfinished run, is damaged. {over}") from error
    if metadata.get("content") != _FORMAT:
        raise CheckpointError(f"{path} is not the state of a run that this version can continue. {over}")
    if metadata.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path} is the state of a run with another recipe or teacher, or with other images; continuing it would "
            f"mix the two. Run the command with the recipe, teacher and images it was started with. {over}"
        )
    return scalars
