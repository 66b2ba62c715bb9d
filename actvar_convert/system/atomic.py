"""Writing files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it, so no reader ever sees half of it.

    Args:
        path: the file; its folder is made when missing, and a file of that name is replaced, where it is a link the one
            that it points to. A device or a pipe is written to as it is.
        content: text (written as UTF-8) or bytes.

    Raises:
        OSError: it cannot be written; ``filename`` is that of the file, not the temporary one.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        _write_whole(target, data)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def _write_whole(target: Path, data: bytes) -> None:
    target = target.resolve() if target.is_symlink() else target
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_bytes(data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """The permissions that new files of this process lack."""
    current = os.umask(0)
    os.umask(current)
    return current
