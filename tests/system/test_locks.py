"""A folder of unfinished work has one owner; a dead one is replaced, one on another host is asked about."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from actvar_convert.errors import InputError
from actvar_convert.system.locks import LOCK, OWNER, Owner, clear, owned, take_over

HOLDER = "import sys, pathlib; from actvar_convert.system.locks import owned\n"
HOLDER += "with owned(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns a folder, until it is told to end or killed."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def leave_owner(folder: Path, **values: object) -> Owner:
    """The file of an owner that is this process but for some values."""
    folder.mkdir(exist_ok=True)
    owner = replace(Owner.here(), **values)  # type: ignore[arg-type]
    (folder / OWNER).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_second_process_is_told_who_and_since_when_and_follows_when_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "x.work"
    with holder(folder) as first:
        with (
            pytest.raises(
                InputError, match=rf"x\.work is in use by process {first.pid} of this machine, since 2"
            ) as said,
            owned(folder),
        ):
            pass
        assert " s ago): -c " in said.value.message and f"kill {first.pid}" in said.value.message
        with pytest.raises(InputError, match="in use"), take_over(), owned(folder):
            pass
        assert {entry.name for entry in folder.iterdir()} == {LOCK, OWNER}
        first.communicate("")
    assert not list(tmp_path.iterdir())
    with owned(folder):
        (folder / "kept").touch()
    assert [entry.name for entry in folder.iterdir()] == ["kept"]


def test_an_owner_that_was_killed_is_replaced_and_its_half_written_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "x.work"
    with holder(folder) as first:
        (folder / ".state.0123abcd.tmp").touch()
        (folder / "state").touch()
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert Owner.of(folder) is not None
    with owned(folder):
        assert {entry.name for entry in folder.iterdir()} == {"state", LOCK, OWNER}
        found = Owner.of(folder)
        assert found is not None and found.pid == os.getpid() and abs(found.since - time.time()) < 60


@pytest.mark.parametrize("content", ["", "[]", '{"host": 1}', '{"pid": "x"}'])
def test_an_owner_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / OWNER).write_text(content)
    with owned(tmp_path):
        assert Owner.of(tmp_path) is not None


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    folder = tmp_path / "x.work"
    leave_owner(folder, pid=os.getppid(), started=time.time() - 1000)
    with owned(folder):
        pass


def test_a_living_owner_counts_where_its_lock_does_not_reach(tmp_path: Path) -> None:
    folder = tmp_path / "x.work"
    with holder(tmp_path / "elsewhere"):
        other = Owner.of(tmp_path / "elsewhere")
        assert other is not None
        leave_owner(folder, **asdict(other))
        with pytest.raises(InputError, match=f"in use by process {other.pid}"), owned(folder):
            pass
    assert [entry.name for entry in folder.iterdir()] == [OWNER]


def test_an_owner_on_another_host_is_refused_until_it_is_overruled(tmp_path: Path) -> None:
    folder = tmp_path / "x.work"
    leave_owner(folder, host="node7", since=time.time() - 7260)
    said = r"in use by process \d+ of the host node7, since .* \(2 h 01 min ago\).*--take-over"
    with pytest.raises(InputError, match=said), owned(folder):
        pass
    assert [entry.name for entry in folder.iterdir()] == [OWNER]
    with take_over(), owned(folder):
        pass
    assert not folder.exists()


def test_a_lock_that_another_host_has_left_behind_is_overruled_too(tmp_path: Path) -> None:
    folder = tmp_path / "x.work"
    with holder(folder):
        leave_owner(folder, host="node7")
        with pytest.raises(InputError, match="node7"), owned(folder):
            pass
        with take_over(), owned(folder):
            found = Owner.of(folder)
            assert found is not None and found.pid == os.getpid()


def test_the_owner_enters_again_but_no_other_thread(tmp_path: Path) -> None:
    said: list[str] = []

    def enter() -> None:
        try:
            with owned(tmp_path):
                said.append("entered")
        except InputError as error:
            said.append(error.message)

    with owned(tmp_path) as first, owned(tmp_path / "evaluation") as second, owned(tmp_path) as third:
        assert (first, second, third) == (True, False, False) and not (tmp_path / "evaluation").exists()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(said) == 1 and "in use by process" in said[0]


def test_clearing_leaves_the_lock_and_takes_what_tells_whose_the_rest_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **how: gone.append(self.name) or unlink(self, **how))
    with owned(tmp_path / "x.work"):
        for name in ("a", "state", "z"):
            (tmp_path / "x.work" / name).touch()
        (tmp_path / "x.work" / "folder").mkdir()
        gone.clear()
        clear(tmp_path / "x.work", last="state")
        assert gone[-1] == "state" and len(gone) == 3
        assert {entry.name for entry in (tmp_path / "x.work").iterdir()} == {LOCK, OWNER}
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file is in the way"), owned(tmp_path / "file" / "x.work"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
