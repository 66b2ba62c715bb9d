"""Reading PyTorch files (.pth, .pt, .bin) without executing anything they contain, memory-mapped."""

from __future__ import annotations

import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError
from actvar_convert.files.replacing import explain_os_errors
from actvar_convert.system.device import memory_text

PICKLE_LIMIT = 64 * 2**20
"""Bytes of the object graph beside the tensors; that of a training checkpoint with optimiser state is about one MB."""

NESTING_LIMIT = 16
ENTRY_LIMIT = 1_000_000

_DAMAGE = (
    *(RuntimeError, ValueError, KeyError, IndexError, EOFError, TypeError, AttributeError, MemoryError),
    *(AssertionError, OverflowError, struct.error),
)
"""What torch's reader raises on an object graph of which single bytes are wrong."""


def read_torch(path: Path) -> dict[str, Tensor]:
    """Every tensor of a PyTorch file under its dotted path through the nested dictionaries, memory-mapped.

    Raises:
        CheckpointError: the file is damaged, claims more than it holds, or needs code execution to be read; the
            message names what it wanted.
    """
    _check_archive(path)
    try:
        with explain_os_errors("read", path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols; what matters is raised below
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        graph = _object_graph(path)
        wanted = wanted_globals(graph)
        if not wanted and graph[1:2] > b"\x02":
            raise CheckpointError(
                f"{path} was saved with pickle protocol {graph[1]}, which cannot be read safely. "
                "Load it where you trust it and save its state_dict again with torch.save as it comes."
            ) from error
        raise _refused(path, wanted) from error
    except _DAMAGE as error:
        first_line = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{path} is damaged: {first_line}. Download or save it again.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds {'one tensor' if isinstance(content, Tensor) else 'a ' + type(content).__name__}, not a "
            "dictionary of named tensors. Save the model's state_dict."
        )
    tensors = dict(_flatten(content, path))
    _check_claims(path, tensors)
    return tensors


def refuse_pickle(path: Path) -> CheckpointError:
    """The error for a file that is a bare pickle: an old PyTorch format or any Python object."""
    with explain_os_errors("read", path), path.open("rb") as file:
        wanted = wanted_globals(file.read(PICKLE_LIMIT))
    if wanted:
        return _refused(path, wanted)
    return CheckpointError(
        f"{path} is a bare pickle or in the format that PyTorch wrote before version 1.6, which cannot be "
        "memory-mapped. Load it where you trust it and save its state_dict again with a current torch.save."
    )


def wanted_globals(pickled: bytes) -> list[str]:
    """Names of the functions and classes that a pickle asks for, except those of plain tensors; executes nothing."""
    found: set[str] = set()
    strings: list[str] = []
    memo: dict[int, str] = {}
    latest = "?"  # what the previous operation pushed, if it was a string
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if isinstance(argument, str) and opcode.name.endswith(("UNICODE", "UNICODE8", "STRING")):
                latest = argument
                strings.append(latest)
                continue
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = latest
            elif opcode.name in ("BINPUT", "LONG_BINPUT") and isinstance(argument, int):
                memo[argument] = latest
            elif opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
                strings.append(memo.get(argument, "?"))
            elif opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
            latest = "?"
    except (ValueError, IndexError, OverflowError, struct.error):
        pass
    return sorted(name for name in found if not name.startswith(("torch.", "collections.OrderedDict")))


def _refused(path: Path, wanted: list[str]) -> CheckpointError:
    asked = f"it asks for {', '.join(wanted)}" if wanted else "it asks for more than tensors"
    return CheckpointError(
        f"{path} cannot be read without executing code ({asked}), which is never done. If you trust it, load it "
        "yourself and save only its tensors: torch.save(model.state_dict(), ...) or safetensors."
    )


def _check_archive(path: Path) -> None:
    """A PyTorch file stores its records uncompressed; anything that would unpack to more than the file is refused."""
    try:
        with explain_os_errors("read", path), zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is a damaged zip file: {error}. Download or save it again.") from error
    size = path.stat().st_size
    total = sum(record.file_size for record in records)
    if total > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise CheckpointError(
            f"{path} unpacks to {memory_text(total)} from {memory_text(size)}: PyTorch never compresses, so this was "
            "not written by torch.save and may be a zip bomb. Get the file from its source again."
        )
    graph = [record for record in records if record.filename.endswith("data.pkl")]
    if len(graph) != 1 or graph[0].file_size > PICKLE_LIMIT:
        raise CheckpointError(
            f"{path} describes its tensors in {len(graph)} object graphs of "
            f"{memory_text(sum(record.file_size for record in graph))}; a model has one of a few MB. "
            "Save only the model's state_dict."
        )


def _object_graph(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged: {error}. Download or save it again.") from error


def _flatten(content: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries with dotted names; dictionaries that contain themselves are refused."""
    pending: list[tuple[str, Mapping[Any, Any], int]] = [("", content, 0)]
    visited = 0
    while pending:
        prefix, mapping, level = pending.pop()
        for key, value in mapping.items():
            visited += 1
            if visited > ENTRY_LIMIT or level > NESTING_LIMIT:
                raise CheckpointError(f"{path} nests dictionaries without end. Save only the model's state_dict.")
            if not isinstance(key, str):
                continue
            if isinstance(value, Tensor):
                yield prefix + key, value
            elif isinstance(value, Mapping):
                pending.append((f"{prefix}{key}.", value, level + 1))


def _check_claims(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors without plain values, and tensors that claim more values than the file holds."""
    odd = [name for name, t in tensors.items() if t.layout != torch.strided or t.is_meta or t.is_quantized]
    if odd:
        raise CheckpointError(
            f"{path} holds sparse, quantised or empty (meta) tensors: {', '.join(odd[:5])}. Save plain dense tensors."
        )
    size = path.stat().st_size
    claims = sum(t.numel() * t.element_size() for t in tensors.values())
    if claims > 2 * size + 2**20:
        raise CheckpointError(
            f"{path} claims {memory_text(claims)} of values in {memory_text(size)} of file: many names share one "
            "memory, or its shapes are made up. Save each tensor on its own (contiguous)."
        )
