"""The readers on hostile files: a few of those that ``tools/hostile.py`` tries by the hundred thousand."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import hostile
import pytest

READERS = ["safetensors", "inspect safetensors", "pth", "inspect pth", "index.json", "config.json", "manifest.json"]
READERS += ["recipe.yaml", "yaml", "image", "npz", "run state"]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, hostile.Target]:
    return hostile.targets(tmp_path_factory.mktemp("seeds") / "made")


def test_every_reader_is_tried(readers: dict[str, hostile.Target]) -> None:
    assert list(readers) == READERS


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("default")
def test_a_reader_reads_or_refuses(
    readers: dict[str, hostile.Target], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    faults, _ = hostile.run(readers[name], 40, 1, tmp_path / "case")
    assert not faults


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(readers: dict[str, hostile.Target], name: str, tmp_path: Path) -> None:
    target = readers[name]
    with hostile.watching():
        assert hostile.fault_of(target, target.seeds[0], tmp_path / "case") is None


class Evil:
    def __reduce__(self) -> tuple[object, tuple[()]]:
        return os.getcwd, ()


def test_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does everything wrong shows that the tool would notice."""
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    hoard: list[bytes] = []

    def wrong(path: Path) -> None:
        data = path.read_bytes()
        if data == b"crash":
            raise KeyError("x")
        if data == b"write":
            elsewhere.write_text("x")
        if data == b"memory":
            hoard.append(b"x" * 200_000_000)
        if data == b"spin":
            while True:
                pass
        if data.startswith(b"\x80"):
            pickle.loads(data)
        if data == b"exec":
            exec(f"x = '{hostile.MARK}'")

    monkeypatch.setattr(hostile, "SECONDS", 2.0)
    target = hostile.Target([b"x"], "file", wrong, [])
    with hostile.watching():
        found = {
            data: hostile.fault_of(target, data, tmp_path / "case")
            for data in (b"fine", b"crash", b"write", b"spin", b"exec", b"memory", pickle.dumps(Evil()))
        }
    assert found.pop(b"fine") is None
    assert found[b"crash"] == "KeyError at test_hostile.py: wrong"
    assert str(found[b"write"]).startswith("open") and "to write" in str(found[b"write"])
    assert found[b"spin"] == "more than 2 seconds"
    assert found[b"exec"] == "exec of the payload"
    assert found[b"memory"] == "memory beyond the file's size"
    assert str(found[pickle.dumps(Evil())]).startswith("pickle.find_class")
