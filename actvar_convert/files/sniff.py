"""What a file is, from its first bytes, so that a message can name it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal, NamedTuple

from actvar_convert.files.replacing import explain_os_errors

FileFormat = Literal["torch", "safetensors", "pickle", "other"]

SAFETENSORS_HEADER_LIMIT = 100_000_000


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
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > len(head) - 4 else "\0"
    if text.isprintable() or all(c.isprintable() or c.isspace() for c in text):
        if start.startswith((b"{", b"[")):
            return Sniffed("other", "a JSON text", _WEIGHTS)
        return Sniffed("other", "a text file", _WEIGHTS)
    return Sniffed("other", "a binary file of no known kind, or a damaged one", _DOWNLOAD)
