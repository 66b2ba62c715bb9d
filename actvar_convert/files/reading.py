"""Reading named tensors from whatever holds them: PyTorch files, safetensors, sharded folders."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files.replacing import explain_os_errors, is_plain_name
from actvar_convert.files.sniff import sniff
from actvar_convert.files.torch_files import read_torch, refuse_pickle
from actvar_convert.system.device import memory_text

INDEX_SUFFIX = ".index.json"
JSON_LIMIT = 64 * 2**20


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, or of all files that an index (``*.index.json``) lists, by name.

    The tensors are views of the mapped files: values are read when they are used, and writing to them changes memory
    only, never the file.

    Raises:
        InputError: no such file, or no permission.
        CheckpointError: the file is damaged or is not weights; the message says what it is instead.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_sharded(path)
    sniffed = sniff(path)
    if sniffed.format == "torch":
        return read_torch(path)
    if sniffed.format == "safetensors":
        return _read_safetensors(path)
    if sniffed.format == "pickle":
        raise refuse_pickle(path)
    raise CheckpointError(f"{path} is {sniffed.what}, not weights. {sniffed.remedy}")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: no such file, or no permission.
        CheckpointError: not JSON, or not an object.
    """
    with explain_os_errors("read", path):
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} is too large for a configuration: {memory_text(path.stat().st_size)}.")
        data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not data.strip() else str(error)
        raise CheckpointError(
            f"{path} is not valid JSON ({reason}): truncated or edited. Restore or rewrite it."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, an object was expected. Restore it.")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} holds numbers in a format that cannot be read here ({error}). Save it in fp32, bf16 or fp16."
            ) from error


def _opened(path: Path) -> Any:
    try:
        with explain_os_errors("read", path):
            return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} is a damaged or truncated safetensors file of {size:,} bytes ({error}). "
            "Download, copy or write it again."
        ) from error


def _read_sharded(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: it is not the index of a sharded checkpoint. Restore it.")
    shards = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in shards if not is_plain_name(name)]
    if outside:
        raise CheckpointError(
            f"{index} points outside of its folder: {', '.join(outside[:3])}. Get it from its source."
        )
    indices = [name for name in shards if name.endswith(INDEX_SUFFIX)]
    if indices:
        raise CheckpointError(f"{index} lists {indices[0]}, an index and no file of weights. Get it from its source.")
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} lists files that are missing. Download or copy them too:", [str(index.parent / n) for n in absent]
        )
    found: dict[str, Tensor] = {}
    for name in shards:
        found.update(read_tensors(index.parent / name))
    lost = sorted(set(weight_map) - set(found))
    if lost:
        raise CheckpointError(
            f"the files of {index} lack {len(lost)} of the {len(weight_map)} tensors it lists, {lost[0]} for one. "
            "They are of another version, or damaged: download or copy them again."
        )
    return found


def weight_file(folder: Path, stem: str) -> Path | None:
    """The file or index in a folder that holds the weights called ``stem`` ("model", "var", "vae"), if any."""
    for name in (f"{stem}.safetensors{INDEX_SUFFIX}", f"{stem}.safetensors", f"{stem}.pth", f"{stem}.pt"):
        if (folder / name).is_file():
            return folder / name
    return None


def require_exists(path: Path) -> None:
    """Checks that a path names something.

    Raises:
        InputError: it does not; the message proposes what is there under a similar name.
    """
    with explain_os_errors("read", path):
        if path.exists():
            return
        parent = path.absolute().parent
        names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    if near:
        hint = f"Did you mean {' or '.join(str(path.with_name(name)) for name in near)}?"
    elif parent.is_dir():
        hint = f"The folder {parent} is there; look at the name in it."
    else:
        hint = f"There is no folder {parent} either."
    raise InputError(f"{path} does not exist. {hint}")
