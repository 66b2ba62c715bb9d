"""stdout and stderr as the command needs them: any text can be written, even where nobody reads it."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import unicodedata
from typing import Any

ALIKE = "actvar-alike"
"""Name of the error handler that puts what looks alike in place of what an encoding lacks."""

_ALIKE = {"–": "-", "—": "-", "×": "x", "…": "...", "→": ">", "≤": "<=", "≥": ">=", "’": "'", "“": '"', "”": '"'}  # noqa: RUF001


def prepare_streams() -> None:
    """Makes stdout and stderr take any text: never an error of encoding, of a closed stream or of a closed pipe."""
    codecs.register_error(ALIKE, _alike)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(number)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        elif isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _tolerant(stream, quiet=name == "stderr"))


def _tolerant(stream: io.TextIOWrapper, quiet: bool) -> io.TextIOWrapper:
    """The same stream, written to as ``_Unread`` says; a console of Windows, which is no file, keeps its own way."""
    buffer = stream.buffer
    if not isinstance(getattr(buffer, "raw", buffer), io.FileIO):
        stream.reconfigure(errors=ALIKE)
        return stream
    raw = _Unread(stream.fileno(), "w", closefd=False)
    raw.quiet = quiet
    return io.TextIOWrapper(
        raw if isinstance(buffer, io.FileIO) else io.BufferedWriter(raw),  # PYTHONUNBUFFERED
        stream.encoding,
        ALIKE,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Unread(io.FileIO):
    """A stream whose reader may leave (``| head -1``): what is written after that goes nowhere, and the work goes on.

    Another failure, such as a full disk, is raised once, for the interpreter flushes again when it ends. If ``quiet``
    it is not: no training ends because its log is full.
    """

    failed = quiet = False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.failed:
            return size
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            if self.quiet or error.errno == errno.EPIPE:
                return size
            raise


def _occupy(number: int) -> None:
    """Puts the null device on a standard descriptor that is closed, so that no file of the work gets its number."""
    try:
        os.fstat(number)
    except OSError:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)


def _alike(error: UnicodeError) -> tuple[str | bytes, int]:
    """The error handler: look-alikes in ASCII; a byte of a file name that is no text as ``\\xNN``; else ``?``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character in _ALIKE:
        return _ALIKE[character]
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"
