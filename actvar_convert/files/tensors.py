"""Named tensors in files: what a file is, reading it without executing anything, writing it as safetensors.

Reads PyTorch files, safetensors, and folders of shards with an index (``*.index.json``, the convention of the hub).
This is the only module that opens files of weights.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import math
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError, explain_os_errors
from actvar_convert.files.contents import Contents, extent, steadily, unchanged
from actvar_convert.system.atomic import is_plain_name
from actvar_convert.system.device import memory_text

INDEX_SUFFIX = ".index.json"
JSON_LIMIT = 64 * 2**20
SAFETENSORS_HEADER_LIMIT = 100_000_000

PICKLE_LIMIT = 64 * 2**20
"""Bytes of the object graph beside the tensors; that of a training checkpoint with optimiser state is about one MB."""

NESTING_LIMIT = 16
ENTRY_LIMIT = 1_000_000

_DAMAGE = (
    *(RuntimeError, ValueError, KeyError, IndexError, EOFError, TypeError, AttributeError, MemoryError),
    *(AssertionError, OverflowError, struct.error),
)
"""What torch's reader raises on an object graph of which single bytes are wrong."""


def open_tensors(path: Path) -> Contents:
    """Names and shapes of every tensor of a file, or of those that an index (``*.index.json``) lists.

    Raises:
        InputError: no such file, or no permission.
        CheckpointError: the file is damaged or is not weights; the message says what it is instead. Changed: it was
            written to meanwhile.
    """
    with unchanged(path) as stamp:
        contents = _open_sharded(path) if path.name.endswith(INDEX_SUFFIX) else _open_file(path)
    contents.stamps[path] = stamp
    return contents


def _open_file(path: Path) -> Contents:
    sniffed = sniff(path)
    if sniffed.format == "torch":
        return _open_torch(path)
    if sniffed.format == "safetensors":
        return _open_safetensors(path)
    if sniffed.format == "pickle":
        raise refuse_pickle(path)
    raise CheckpointError(f"{path} is {sniffed.what}, not weights. {sniffed.remedy}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file or index by name, in memory of its own.

    Raises:
        InputError, CheckpointError: see ``open_tensors``.
    """
    return steadily(lambda: open_tensors(path).read())


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    _open_safetensors(path)
    found = _header(path)[0].get("__metadata__", {})
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


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


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files and the index in a folder that hold weights called ``stem`` ("model", "var", "vae")."""
    names = (f"{stem}.safetensors{INDEX_SUFFIX}", f"{stem}.safetensors", f"{stem}.pth", f"{stem}.pt")
    return [folder / name for name in names if (folder / name).is_file()]


def weight_file(folder: Path, stem: str) -> Path | None:
    """The file or index in a folder that holds the weights called ``stem``, if any.

    Raises:
        CheckpointError: there are several.
    """
    found = weight_files(folder, stem)
    if len(found) > 1:
        raise several_weights(folder, found)
    return found[0] if found else None


def listed_files(file: Path) -> list[Path]:
    """A file, and if it is an index those of the files that it lists which are there."""
    if not file.name.endswith(INDEX_SUFFIX):
        return [file]
    listed = read_json(file).get("weight_map")
    names = sorted({str(name) for name in listed.values()}) if isinstance(listed, Mapping) else []
    return [file, *(file.parent / name for name in names if is_plain_name(name) and (file.parent / name).is_file())]


def several_weights(folder: Path, files: Sequence[Path]) -> CheckpointError:
    """The error for a folder that does not say which of its files are the weights."""
    names = " and ".join(file.name for file in files)
    return CheckpointError(
        f"{folder} holds {names}, and one of them may be out of date. Name the one that is meant, or move the others "
        "away."
    )


def require_exists(path: Path) -> None:
    """Checks that a path names something.

    Raises:
        InputError: it does not; the message proposes what is there under a similar name.
    """
    with explain_os_errors("read", path):
        if path.exists():
            return
        if path.is_symlink():
            raise InputError(f"{path} is a link that leads to nothing ({os.readlink(path)}). Give what it should name.")
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


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_weights(folder: Path, stem: str, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Writes ``STEM.safetensors``, or ``STEM-0000N-of-0000M.safetensors`` with ``STEM.safetensors.index.json``.

    Args:
        folder: an existing folder.
        stem: name of the weights.
        tensors: by name, on any device.
        max_shard_bytes: of values per file; a larger tensor has a file of its own.
    """
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        with explain_os_errors("write", folder / file):
            write_tensors(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = folder / f"{stem}.safetensors{INDEX_SUFFIX}"
        content = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        with explain_os_errors("write", index):
            index.write_text(json.dumps(content, indent=2) + "\n")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file.

    Args:
        file: replaced if it exists.
        tensors: by name, on any device.
        metadata: for the header, beside the format.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(separate(tensors), file, metadata={"format": "pt", **(metadata or {})})
    file.chmod(mode)  # safetensors writes through a temporary file that only its owner may read


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with a memory of its own: files hold whole memories, and safetensors shares none."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        ready = tensor.detach().cpu().contiguous()
        memory = ready.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != ready.numel() * ready.element_size():
            ready = ready.clone()
        seen.add(ready.untyped_storage().data_ptr())
        out[name] = ready
    return out


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with explain_os_errors("read", path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a weight file; of an index, that of the lines "HASH  NAME" of the index's files in order."""
    if not path.name.endswith(INDEX_SUFFIX):
        return sha256_of(path)
    names = sorted(set(read_json(path).get("weight_map", {}).values()))
    lines = "".join(f"{sha256_of(path.parent / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


FileFormat = Literal["torch", "safetensors", "pickle", "other"]


class Sniffed(NamedTuple):
    """What a file seems to be.

    Attributes:
        format: how to read it; "other" cannot be read as weights.
        what: words for a message, with article: "a Git LFS pointer".
        remedy: what a person can do about it, a sentence; empty for weights.
    """

    format: FileFormat
    what: str
    remedy: str = ""


_DOWNLOAD = "Download the weights themselves again."
_WEIGHTS = "Give the .pth or .safetensors file, or the folder that holds it."

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file (a quantised language model)"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
)


def sniff(path: Path) -> Sniffed:
    """Tells what a file is from its beginning, reading a few kilobytes.

    Raises:
        InputError: the file cannot be opened.
    """
    with explain_os_errors("read", path):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4096)
    if size == 0:
        return Sniffed("other", "an empty file", "The download or copy did not happen; do it again.")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head.startswith(b"version https://git-lfs"):
        return Sniffed(
            "other", "a Git LFS pointer, not the file it points to", "Run `git lfs pull`, or download the file itself."
        )
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return Sniffed("other", what, _WEIGHTS)
    if head[257:262] == b"ustar":
        return Sniffed("other", "a tar archive", "Unpack it first.")
    header = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and header <= SAFETENSORS_HEADER_LIMIT:
        return Sniffed("safetensors", "a safetensors file")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return Sniffed("pickle", "a bare pickle")
    return _sniff_text(head)


def _sniff_zip(path: Path) -> Sniffed:
    try:
        if not zipfile.is_zipfile(path):
            truncated = "a truncated zip file (a PyTorch checkpoint is one)"
            return Sniffed("other", truncated, f"It is cut short. {_DOWNLOAD}")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return Sniffed("other", "a damaged zip file", _DOWNLOAD)
    if any(name.endswith("/constants.pkl") for name in names):
        return Sniffed("other", "a TorchScript program", "Save the model's state_dict instead.")
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return Sniffed("torch", "a PyTorch checkpoint")
    return Sniffed("other", "a zip archive without a PyTorch checkpoint in it", "Unpack it first.")


def _sniff_text(head: bytes) -> Sniffed:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return Sniffed("other", "an HTML page (perhaps the error page of a download)", _DOWNLOAD)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # which may end within a letter
    except UnicodeDecodeError:
        text = "\0"
    if all(letter.isprintable() or letter.isspace() for letter in text):
        if start.startswith((b"{", b"[")):
            return Sniffed("other", "a JSON text", _WEIGHTS)
        return Sniffed("other", "a text file", _WEIGHTS)
    return Sniffed("other", "a binary file of no known kind, or a damaged one", _DOWNLOAD)


_SAFETENSORS = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
"""Dtypes by their names in a header, see github.com/huggingface/safetensors."""


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the values begin.

    Raises:
        CheckpointError: the file is damaged.
    """
    with explain_os_errors("read", path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, SAFETENSORS_HEADER_LIMIT) else b""
    try:
        if len(text) != length:
            raise ValueError("its header is cut short")
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except (ValueError, RecursionError) as error:
        raise _damaged_safetensors(path, size, str(error)) from error
    return header, 8 + length


def _damaged_safetensors(path: Path, size: int, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a damaged or truncated safetensors file of {size:,} bytes ({why}). "
        "Download, copy or write it again."
    )


def _open_safetensors(path: Path) -> Contents:
    header, begin = _header(path)
    size = path.stat().st_size
    contents, spans = Contents(), []
    for name, about in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (first, last) = about["dtype"], about["shape"], about["data_offsets"]
            counts = [first, last, *shape]
            if not isinstance(kind, str) or not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("a size that is no number")
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged_safetensors(path, size, f"its header describes {name!r} wrongly") from error
        if kind not in _SAFETENSORS:
            raise CheckpointError(
                f"{path} holds numbers in a format that cannot be read here ({kind}). Save it in fp32, bf16 or fp16."
            )
        dtype = _SAFETENSORS[kind]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise _damaged_safetensors(path, size, f"{name} has other bytes than its shape needs")
        spans.append((first, last))
        contents.add(name, torch.empty(shape, dtype=dtype, device="meta"), path, begin + first)
    ends = [0, *(last for _, last in sorted(spans))]
    if [first for first, _ in sorted(spans)] != ends[:-1] or begin + ends[-1] != size:
        raise _damaged_safetensors(path, size, "its header does not fit its size")
    return contents


def shards_of(index: Path) -> dict[str, str]:
    """The file of every tensor that an index lists.

    Raises:
        CheckpointError: it is no index, or names files that cannot be its shards or are missing.
    """
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
    return {str(tensor): str(name) for tensor, name in weight_map.items()}


def _open_sharded(index: Path) -> Contents:
    listed = shards_of(index)
    contents = Contents()
    others: list[str] = []
    for shard in sorted(set(listed.values())):
        found = open_tensors(index.parent / shard)
        contents.stamps |= found.stamps
        for name in found.tensors:
            if listed.get(name) == shard:
                contents.take(name, found)
            else:
                others.append(f"{name} of {shard}")
    lost = sorted(set(listed) - set(contents.tensors))
    if lost:
        raise CheckpointError(
            f"the files of {index} lack {len(lost)} of the {len(listed)} tensors it lists, {lost[0]} for one. "
            "They are of another version, or damaged: download or copy them again."
        )
    if others:
        contents.notes.append(
            f"{index.name} does not name {cut(others)}: left out, every tensor is taken from the file that it names"
        )
    return contents


def cut(names: Sequence[str], shown: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _open_torch(path: Path) -> Contents:
    """Every tensor of a PyTorch file under its dotted path through the nested dictionaries.

    Raises:
        CheckpointError: the file is damaged, claims more than it holds, or needs code execution to be read; the
            message names what it wanted.
    """
    records = _records(path)
    odd = CheckpointError(f"{path} holds sparse, quantised or empty (meta) tensors. Save plain dense tensors.")
    try:
        with explain_os_errors("read", path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols; what matters is raised below
            content = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        graph = _object_graph(path)
        wanted = wanted_globals(graph)
        if not wanted and graph[1:2] > b"\x02":
            raise CheckpointError(
                f"{path} was saved with pickle protocol {graph[1]}, which cannot be read safely. "
                "Load it where you trust it and save its state_dict again with torch.save as it comes."
            ) from error
        raise _refused(path, wanted) from error
    except NotImplementedError as error:
        raise odd from error
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
    contents = Contents()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise odd
        memory = tensor.untyped_storage()
        begin = getattr(memory, "_checkpoint_offset", None)
        if begin is None:
            raise odd
        size = memory.nbytes()
        ends = tensor.storage_offset() + (extent(tensor) if tensor.numel() else 0)
        if (size and records.get(begin) != size) or ends * tensor.element_size() > size:
            raise CheckpointError(f"{path} is damaged: {name} lies outside of its record. Download or save it again.")
        contents.add(name, tensor, path, begin + tensor.storage_offset() * tensor.element_size())
    return contents


def refuse_pickle(path: Path) -> CheckpointError:
    """The error for a file that is a bare pickle: an old PyTorch format or any Python object."""
    with explain_os_errors("read", path), path.open("rb") as file:
        wanted = wanted_globals(file.read(PICKLE_LIMIT))
    if wanted:
        return _refused(path, wanted)
    return CheckpointError(
        f"{path} is a bare pickle or in the format that PyTorch wrote before version 1.6, which cannot be "
        "read in pieces. Load it where you trust it and save its state_dict again with a current torch.save."
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


def _records(path: Path) -> dict[int, int]:
    """Sizes of the records of a PyTorch file by where their content begins.

    They are stored uncompressed; anything that would unpack to more than the file is refused.
    """
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
    with explain_os_errors("read", path), path.open("rb") as file:
        return {_content_begin(file, record): record.file_size for record in records}


def _content_begin(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where the content of a record begins: after its local header of 30 bytes, name and padding."""
    file.seek(record.header_offset + 26)
    name, padding = struct.unpack("<HH", file.read(4).ljust(4, b"\0"))
    return int(record.header_offset + 30 + name + padding)


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
    """Refuses tensors that claim more values than the file holds."""
    size = path.stat().st_size
    claims = sum(t.numel() * t.element_size() for t in tensors.values())
    if claims > 2 * size + 2**20:
        raise CheckpointError(
            f"{path} claims {memory_text(claims)} of values in {memory_text(size)} of file: many names share one "
            "memory, or its shapes are made up. Save each tensor on its own (contiguous)."
        )
