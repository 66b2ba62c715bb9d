"""Files that appear whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from actvar_convert.errors import InputError
from actvar_convert.files import tensors as weight_files
from actvar_convert.files.run_state import RunState, save_run_state
from actvar_convert.files.sparse_folder import load_sparse, read_provenance, save_sparse, update_file
from actvar_convert.files.tensors import sha256_of
from actvar_convert.models.model import Model
from actvar_convert.system.atomic import COMMIT, STAGING, replacing_files


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_permission(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_hash() -> None:
    assert sha256_of(Path(os.devnull)) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(("failure", "cause"), [(_full_disk, "the disk is full"), (_no_permission, "no permission")])
@pytest.mark.parametrize("moment", ["fsync", "replace", "rename", "mkdir"])
def test_failures_leave_everything_as_it_was(
    tmp_path: Path,
    sparse: Model,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[..., None],
    cause: str,
    moment: str,
) -> None:
    (tmp_path / "kept.txt").write_text("before")
    existing = save_sparse(sparse, tmp_path / "existing", provenance={}, recipe_text="a: 1\n")
    save_run_state(tmp_path / "state", RunState(scalars={"step": 1}))
    before = _everything(tmp_path)
    owner = {"fsync": os, "replace": os, "rename": Path, "mkdir": Path}[moment]

    def attempt(action: Callable[[], object]) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(owner, moment, failure)
            with pytest.raises(InputError, match=cause):
                action()
        assert _everything(tmp_path) == before

    if moment != "replace":
        attempt(lambda: save_sparse(sparse, tmp_path / "deep" / "er" / "new", provenance={}, recipe_text="a: 2\n"))
        attempt(lambda: save_sparse(sparse, existing, provenance={}, recipe_text="a: 2\n"))
    if moment in ("fsync", "replace"):
        attempt(lambda: update_file(existing, "report.json", b"after"))
        attempt(lambda: save_run_state(tmp_path / "state", RunState(scalars={"step": 2})))


def test_disk_that_fills_up_while_weights_are_written(
    tmp_path: Path, sparse: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def fails_like_the_writer(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weight_files, "save_file", fails_like_the_writer)
    with pytest.raises(InputError, match=r"model.safetensors: the disk is full. Free some space"):
        save_sparse(sparse, tmp_path / "new", provenance={}, recipe_text="a: 1\n")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_any_writing(
    tmp_path: Path, sparse: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"it needs [\d.]+ [kM]B and the disk has 1 kB free"):
        save_sparse(sparse, tmp_path / "a" / "b", provenance={}, recipe_text="a: 1\n")
    assert not list(tmp_path.iterdir())


def test_failure_after_the_commit_is_completed_later(
    tmp_path: Path, sparse: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={"name": "old"}, recipe_text="a: 1\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", _full_disk)
        with pytest.raises(InputError, match="finish the interrupted save"):
            save_sparse(sparse, folder, provenance={"name": "new"}, recipe_text="a: 2\n")
    assert read_provenance(folder).name == "new"
    assert load_sparse(folder).plans.name == "default"
    assert sorted(_everything(folder)) == ["config.json", "model.safetensors", "recipe.yaml", "vae.safetensors"]


def test_an_exception_of_the_writer_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing_files(tmp_path / "new", []) as staging:
        (staging / "a").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    left = tmp_path / "old" / f"{STAGING}dead"
    left.mkdir()
    with replacing_files(tmp_path / "old", ["*.txt"]) as staging:
        (staging / "b.txt").write_text("new")
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["b.txt"]


@pytest.mark.parametrize(
    "manifest",
    [
        '{"files": [], "stale": ["../kept.txt"]}',
        '{"files": ["../kept.txt"], "stale": []}',
        '{"files": [], "stale": ["/tmp/x"]}',
        '{"files": [], "stale": [1]}',
        '{"files": []}',
        '{"files": ["config.js',
        "[]",
    ],
)
def test_a_made_up_or_damaged_commit_touches_nothing(tmp_path: Path, sparse: Model, manifest: str) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text="a: 1\n")
    (tmp_path / "kept.txt").write_text("kept")
    (folder / COMMIT).mkdir()
    (folder / COMMIT / "manifest.json").write_text(manifest)
    before = _everything(tmp_path)
    with pytest.raises(InputError, match=r"(?s)manifest\.json.*damaged or names files elsewhere"):
        load_sparse(folder)
    assert _everything(tmp_path) == before


def test_names_beyond_ascii_do_not_depend_on_the_locale(
    tmp_path: Path, sparse: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.write_text

    def of_an_old_system(self: Path, data: str, encoding: str | None = None) -> int:
        return original(self, data, encoding=encoding or "ascii")

    monkeypatch.setattr(Path, "write_text", of_an_old_system)
    folder = save_sparse(sparse, tmp_path / "out", provenance={"source": "größer"}, recipe_text="a: ü\n")
    assert read_provenance(folder).source == "größer"
