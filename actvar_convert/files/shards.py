"""Writing named tensors as safetensors, in one file or in shards with an index (the convention of the hub)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from actvar_convert.files.reading import INDEX_SUFFIX
from actvar_convert.files.replacing import explain_os_errors

METADATA = {"format": "pt"}


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def shard_names(tensors: Mapping[str, Tensor], max_bytes: float) -> list[list[str]]:
    """Names in their order, cut into groups of at most ``max_bytes`` (a larger tensor has a group of its own)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_weights(folder: Path, stem: str, tensors: Mapping[str, Tensor], max_shard_bytes: float) -> list[Path]:
    """Writes ``STEM.safetensors``, or ``STEM-0000N-of-0000M.safetensors`` with ``STEM.safetensors.index.json``.

    Args:
        folder: an existing folder.
        stem: name of the weights.
        tensors: by name, on any device.
        max_shard_bytes: of values per file.

    Returns:
        the files written.
    """
    groups = shard_names(tensors, max_shard_bytes)
    if len(groups) == 1:
        _write(folder / f"{stem}.safetensors", tensors)
        return [folder / f"{stem}.safetensors"]
    files = []
    weight_map = {}
    for index, names in enumerate(groups):
        file = folder / f"{stem}-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        _write(file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file.name))
        files.append(file)
    index_file = folder / f"{stem}.safetensors{INDEX_SUFFIX}"
    content = {"metadata": {"total_size": size_of(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    with explain_os_errors("write", index_file):
        index_file.write_text(json.dumps(content, indent=2) + "\n")
    return [*files, index_file]


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with explain_os_errors("write", file):
        file.touch()
        mode = file.stat().st_mode
        save_file(ready, file, metadata=METADATA)
        file.chmod(mode)  # safetensors writes through a temporary file that only its owner may read
