"""One owner for a folder of unfinished work: a second process that would write there is refused, and told by whom.

An operating system's lock says that an owner lives; it goes when the owner dies. A file beside it says who the owner
is. It alone counts where locks do not reach: between hosts that share a file system.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock, Timeout

from actvar_convert.errors import InputError, explain_os_errors
from actvar_convert.system.atomic import make_folders, remove_leftovers, write_whole
from actvar_convert.system.progress import duration

if TYPE_CHECKING:
    from actvar_convert.system.processes import Processes

LOCK, OWNER = ".lock", ".owner.json"

START_TOLERANCE = 2.0
"""Seconds by which two readings of one process's start may differ: a clock that is set moves them."""

ARRIVAL = 1.0
"""Seconds within which a process that has the lock says who it is."""

_HELD: ContextVar[tuple[Path, ...]] = ContextVar("_HELD", default=())
_TAKING_OVER: ContextVar[bool] = ContextVar("_TAKING_OVER", default=False)


@dataclass(frozen=True)
class Owner:
    """Who works in a folder.

    Attributes:
        host: name of the machine.
        pid: the process there.
        started: when the process started, seconds since 1970; tells it from a later one with the same number.
        since: when it took the folder, seconds since 1970.
        command: its command line.
    """

    host: str
    pid: int
    started: float
    since: float
    command: str

    @classmethod
    def here(cls) -> Owner:
        """This process, from now on."""
        started = psutil.Process().create_time()
        return cls(socket.gethostname(), os.getpid(), started, time.time(), shlex.join(sys.argv))

    @classmethod
    def of(cls, folder: Path) -> Owner | None:
        """The owner that a folder names; None if it names none."""
        try:
            values = json.loads((folder / OWNER).read_bytes())
            host, pid, started, since, command = (values[name] for name in cls.__dataclass_fields__)
            return cls(str(host), int(pid), float(started), float(since), str(command))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @property
    def local(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether another process of this host is the owner; of other hosts nothing is known."""
        if self.pid == os.getpid():
            return False
        try:
            started = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True
        return bool(abs(started - self.started) <= START_TOLERANCE)

    def refusal(self, folder: Path) -> InputError:
        """What to say to a second one."""
        since = datetime.fromtimestamp(self.since).astimezone().isoformat(sep=" ", timespec="seconds")
        age = f"since {since} ({duration(max(0.0, time.time() - self.since))} ago)"
        if self.local:
            return InputError(
                f"{folder} is in use by process {self.pid} of this machine, {age}: {self.command}. Wait until it ends, "
                f"or stop it (kill {self.pid}), and start again; or choose another folder."
            )
        return InputError(
            f"{folder} is in use by process {self.pid} of the host {self.host}, {age}: {self.command}. If that process "
            "is dead, give --take-over; else wait until it ends, or choose another folder."
        )


@contextmanager
def take_over() -> Iterator[None]:
    """Within the block, folders whose owner is on another host are taken: for owners that are known to be dead."""
    token = _TAKING_OVER.set(True)
    try:
        yield
    finally:
        _TAKING_OVER.reset(token)


@contextmanager
def owned(folder: Path, processes: Processes | None = None, *, option: str = "") -> Iterator[bool]:
    """Makes this process the owner of a folder, which is made when missing, for as long as the block runs.

    What a writer that was killed has left half-written there is removed. At the end the folder goes, if it is empty.
    An owner may enter again, and folders within are its own too. Processes that a launcher started together are one
    owner: all have to come here.

    Args:
        folder: of unfinished work, or a cache.
        processes: those that share the work.
        option: of the command, that names another folder; said if this one cannot be written.

    Yields:
        whether the folder was not this process's own before.

    Raises:
        InputError: another process is the owner, in all processes alike, or the folder cannot be written.
    """
    place, held = folder.resolve(), _HELD.get()
    if any(place == each or each in place.parents for each in held):
        yield False
        return
    ownership, problem = None, None
    try:
        if processes is None or processes.main:
            try:
                ownership = _Ownership(folder, option)
            except InputError as error:
                problem = error
        if processes is not None:
            problem = processes.from_main(problem)
        if problem is not None:
            raise problem
        token = _HELD.set((*held, place))
        try:
            yield True
        finally:
            _HELD.reset(token)
        if processes is not None:
            processes.wait()
    finally:
        if ownership is not None:
            ownership.end()


def clear(folder: Path, *, last: str | None = None) -> None:
    """Removes all that is in a folder but what says whose it is.

    Args:
        last: the file that goes last, for it tells whose the rest is.
    """
    entries = [entry for entry in folder.glob("*") if entry.name not in (LOCK, OWNER)]
    for entry in sorted(entries, key=lambda entry: entry.name == last):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()


class _Ownership:
    """The lock of a folder and its owner's name, until ``end``."""

    def __init__(self, folder: Path, option: str) -> None:
        self.folder = folder
        self.lock = FileLock(folder / LOCK, timeout=0)
        with explain_os_errors("write", f"{folder} ({option} names another place)" if option else folder):
            self.created = make_folders(folder)
            try:
                self._take()
            except BaseException:
                self._leave()
                raise

    def _take(self) -> None:
        arrived = time.monotonic() + ARRIVAL
        while True:
            try:
                self.lock.acquire()
                break
            except Timeout:
                owner = Owner.of(self.folder)
            if owner is not None and not owner.local and _TAKING_OVER.get():
                (self.folder / LOCK).unlink(missing_ok=True)
            elif owner is not None:
                raise owner.refusal(self.folder)
            elif time.monotonic() > arrived:
                raise InputError(f"{self.folder} is in use by another process. Wait until it ends, and start again.")
            time.sleep(0.05)
        owner = Owner.of(self.folder)
        if owner is not None and (owner.alive if owner.local else not _TAKING_OVER.get()):
            raise owner.refusal(self.folder)
        remove_leftovers(self.folder)
        write_whole(self.folder / OWNER, json.dumps(asdict(Owner.here())))

    def end(self) -> None:
        """Gives the folder up; it goes if nothing is in it."""
        with suppress(OSError):
            (self.folder / OWNER).unlink(missing_ok=True)
        self._leave()

    def _leave(self) -> None:
        """Removes the lock while it is held: whoever waits for that file finds that it is gone, and makes another."""
        if self.lock.is_locked:
            with suppress(OSError):
                (self.folder / LOCK).unlink(missing_ok=True)
            self.lock.release()
        for made in (self.folder, *self.created):
            with suppress(OSError):
                made.rmdir()
