"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from actvar_convert.errors import CheckpointError
from actvar_convert.system.atomic import COMMIT, finish_commit, read_checked, write_checked, write_whole


def test_writes_text_and_bytes_into_a_new_folder(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "b.txt", "größer\n")
    write_whole(tmp_path / "a" / "b.bin", b"\x00\x01")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größer\n".encode()
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\x01"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "inside").write_text("old")
    with pytest.raises(OSError):
        write_whole(folder, "new")
    assert (folder / "inside").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "folder", "new")
    assert caught.value.filename == str(tmp_path / "folder") and caught.value.filename2 is None

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "b.txt", "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "b.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"through it")
    assert os.read(reader, 99) == b"through it" and not (tmp_path / "pipe").is_file()
    os.close(reader)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "pipe", "real"]


def test_intermediate_results_are_taken_if_they_are_whole_and_the_own_ones(tmp_path: Path) -> None:
    path, other = tmp_path / "work" / "sums", tmp_path / "work" / "others"
    assert read_checked(path) is None
    write_checked(path, b"content")
    write_checked(other, b"content")
    good = path.read_bytes()
    assert read_checked(path) == b"content"
    for damaged in (b"", good[:10], good[:-1], good + b"x", good[:-1] + b"x", other.read_bytes(), b"content"):
        path.write_bytes(damaged)
        assert read_checked(path) is None


@pytest.mark.parametrize(
    "manifest", ["[" * 100_000, '{"files": ["a\\u0000b"], "stale": []}', '{"files": [], "stale": ["\\ud800"]}',
                 json.dumps({"files": ["x" * 300], "stale": []})]
)  # fmt: skip
def test_a_manifest_with_names_of_no_file_moves_nothing(tmp_path: Path, manifest: str) -> None:
    (tmp_path / COMMIT).mkdir()
    (tmp_path / COMMIT / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="is damaged or names files elsewhere"):
        finish_commit(tmp_path)
