"""Files and sets of files that appear whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from actvar_convert.errors import CheckpointError, InputError, explain_os_errors

COMMIT = ".actvar-commit"
"""Folder of files that are complete and only have to be moved one level up: finishing that is always safe."""

STAGING = ".actvar-saving-"

CHECKSUM_BYTES = hashlib.sha256().digest_size

_TEMPORARY = ".{}." + "[0-9a-f]" * 8 + ".tmp"
"""Glob pattern of what is not whole yet, by the name that it is to have."""


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it, so no reader ever sees half of it.

    Args:
        path: the file; its folder is made when missing, and a file of that name is replaced, if it is a link the one
            that it points to. A device or a pipe is written to as it is.
        content: text (written as UTF-8) or bytes.

    Raises:
        OSError: it cannot be written; ``filename`` is that of the file, not the temporary one.
    """
    target = Path(path)
    target = target.resolve() if target.is_symlink() else target
    data = content.encode() if isinstance(content, str) else content
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_bytes(data)
        return
    with replacing(target) as temporary:
        temporary.write_bytes(data)


def write_checked(path: Path, content: bytes) -> None:
    """Writes a file of intermediate results whole, with a checksum of its name and content in front."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(checksum(path, content))
        file.write(content)


def read_checked(path: Path) -> bytes | None:
    """What ``write_checked`` wrote under this name; None if there is no such file, or it is damaged or another one."""
    try:
        with path.open("rb") as file:
            expected, content = file.read(CHECKSUM_BYTES), file.read()
    except FileNotFoundError:
        return None
    return content if checksum(path, content) == expected else None


def checksum(path: Path, content: bytes, number: int = 0) -> bytes:
    """SHA-256 of the content of a file, or of a numbered part of it, that stands under this name and no other."""
    digest = hashlib.sha256(f"{number} ".encode() + os.fsencode(path.name) + b"\0")
    digest.update(content)
    return digest.digest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; what is written there takes the place of ``path`` if nothing goes wrong.

    Args:
        path: the file; its folder is made when missing.

    Raises:
        OSError: it cannot be written; ``filename`` is that of the file, not the temporary one.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Forces a file or folder onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing_files(folder: Path, owned: Sequence[str]) -> Iterator[Path]:
    """A staging folder whose files become those of ``folder`` together, or not at all.

    A folder that does not exist yet appears by one rename. In an existing one the complete set is first renamed to
    ``.actvar-commit`` and then moved into place file by file; an interruption in between is finished by
    ``finish_commit``, which every reader and writer calls first. Other files of the folder stay.

    Args:
        folder: where the files belong.
        owned: glob patterns of files that belong to the set; those that are not written again are removed.
    """
    with explain_os_errors("write", folder):
        fresh = not folder.exists()
        created = make_folders(folder.parent)
        staging = (
            folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
            if fresh
            else folder / (STAGING + secrets.token_hex(4))
        )
        try:
            if not fresh:
                finish_commit(folder)
                for left in folder.glob(STAGING + "*"):
                    shutil.rmtree(left)
            staging.mkdir()
            yield staging
            for file in staging.iterdir():
                fsync(file)
            if fresh:
                fsync(staging)
                staging.rename(folder)
                fsync(folder.parent)
            else:
                _commit(folder, staging, owned)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in created:
                with suppress(OSError):
                    parent.rmdir()
            raise


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed have left half-written, in a folder or of it. No other may be writing."""
    left = [*folder.glob(_TEMPORARY.format("*")), *folder.glob(STAGING + "*")]
    for entry in (*left, *folder.absolute().parent.glob(_TEMPORARY.format(glob.escape(folder.name)))):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def make_folders(folder: Path) -> list[Path]:
    """Creates a folder with its parents; returns those that did not exist, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _commit(folder: Path, staging: Path, owned: Sequence[str]) -> None:
    new = sorted(file.name for file in staging.iterdir())
    stale = sorted({file.name for pattern in owned for file in folder.glob(pattern)} - set(new))
    manifest = staging / "manifest.json"
    manifest.write_text(json.dumps({"files": new, "stale": stale}))
    fsync(manifest)
    fsync(staging)
    staging.rename(folder / COMMIT)
    fsync(folder)
    finish_commit(folder)


def finish_commit(folder: Path) -> None:
    """Moves the files of an interrupted save into place; does nothing when there was none.

    Raises:
        CheckpointError: the list of its files is damaged, or names places outside of the folder; nothing is moved then.
        InputError: the files cannot be moved.
    """
    commit = folder / COMMIT
    if not commit.is_dir():
        return
    with explain_os_errors("finish the interrupted save in", folder):
        manifest = commit / "manifest.json"
        if manifest.exists():
            files, stale = _listed(manifest)
            for name in files:
                if (commit / name).exists():
                    os.replace(commit / name, folder / name)
            for name in stale:
                (folder / name).unlink(missing_ok=True)
            fsync(folder)
            manifest.unlink()
        commit.rmdir()
        fsync(folder)


def _listed(manifest: Path) -> tuple[list[str], list[str]]:
    """The names in a manifest: files to move, files to remove; a folder from elsewhere may have made them up."""
    try:
        content = json.loads(manifest.read_bytes())
        files, stale = content["files"], content["stale"]
        plain = all(is_plain_name(name) for name in (*files, *stale)) and not manifest.parent.is_symlink()
    except (ValueError, KeyError, TypeError, RecursionError):
        plain = False
    if not plain:
        raise CheckpointError(
            f"{manifest}, the list of an interrupted save, is damaged or names files elsewhere. Remove the folder "
            f"{manifest.parent} to go back to what was there before it, or get the model from its source again."
        )
    return files, stale


def is_plain_name(name: object) -> bool:
    """Whether something names a file in a folder, neither hidden nor elsewhere, that a file system can hold."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 255:
        return False
    return Path(name).name == name and not name.startswith(".")


def require_writable(folder: Path) -> None:
    """Checks that a folder, which need not exist yet, can be written, by a file in it that goes at once.

    Raises:
        InputError: it cannot, with the reason.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with explain_os_errors("write", folder):
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except FileNotFoundError as error:
            raise InputError(
                f"cannot write {folder}: {existing} takes no new folders. Choose another place."
            ) from error
