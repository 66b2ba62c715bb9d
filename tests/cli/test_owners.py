"""Two processes on one folder: the second is refused before any work; the folder of unfinished work may be named."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from actvar_convert.system.locks import LOCK, OWNER

from .conftest import Actvar
from .test_making import small

HOLDER = """
import contextlib, pathlib, sys
from actvar_convert.system.locks import owned
with contextlib.ExitStack() as stack:
    for name in sys.argv[1:]:
        stack.enter_context(owned(pathlib.Path(name)))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(*folders: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns folders, until it is killed."""
    command = [sys.executable, "-c", HOLDER, *folders]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_command_on_a_folder_is_refused_and_the_result_is_that_of_one(
    actvar: Actvar, dense_file: Path
) -> None:
    assert actvar("convert", dense_file, "--out", "src", *small()).exit_code == 0
    Path("mine.yaml").write_text(f"name: mine\nmodel: {dense_file}\n")
    lines = [
        ("distill", "src", "--out", "b"),
        ("convert", dense_file, "--out", "b", *small()),
        ("run", "mine.yaml", "--out", "b", *small()),
        ("sweep", dense_file, "--out", "b", "--reductions", "0.1", *small()),
        ("evaluate", "src", "--images", 0, "--held-out", 2, "--cache", "kept"),
        ("distill", "src", "--out", "c", "--work", "kept"),
    ]
    with holder("b.work", "kept") as first:
        for line in lines:
            second = actvar(*line)
            assert second.exit_code == 2 and f"in use by process {first.pid} " in second.stderr, second.output
            assert "since 2" in second.stderr and "sampling" not in second.stderr
        assert not Path("b").exists() and not Path("c").exists()
        for name in ("b.work", "kept"):
            assert {entry.name for entry in Path(name).iterdir()} == {LOCK, OWNER}
        first.send_signal(signal.SIGKILL)
        first.wait()
    for out in ("b", "clean"):
        assert actvar("distill", "src", "--out", out).exit_code == 0
    one, other = (load_file(f"{out}/model.safetensors") for out in ("b", "clean"))
    assert all(one[name].equal(other[name]) for name in other)
    kept = actvar(*lines[4])
    assert kept.exit_code == 0 and not any(entry.name.startswith(".") for entry in Path("kept").iterdir()), kept.output
    assert sorted(path.name for path in Path().iterdir()) == ["b", "clean", "dense", "kept", "mine.yaml", "src"]


def test_work_lies_where_it_is_told_and_nothing_is_made_beside_the_result(actvar: Actvar, dense_file: Path) -> None:
    settings = "experts: {count: 8}\ngate: {rank: 4}\nbudget: {reduction: 0.1}\n"
    Path("mine.yaml").write_text(f"name: mine\nmodel: {dense_file}\n{settings}")
    short = ["--set", "evaluate={images: 20, held_out: 4, batch: 20}", "--set", "benchmark={batches: [1]}"]
    for name in ("made", "converted", "trained", "swept"):
        (Path(name) / "out").mkdir(parents=True)
    for line in (
        ("run", "mine.yaml", "--out", "made/out", *small(), *short),
        ("convert", dense_file, "--out", "converted/out", *small()),
        ("distill", "converted/out", "--out", "trained/out"),
        ("sweep", dense_file, "--out", "swept/out", "--reductions", "0.1", *small(), *short[:2]),
    ):
        before = Path(str(line[3])).parent.stat().st_mtime_ns
        result = actvar(*line, "--work", "deep/work")
        assert result.exit_code == 0, result.output
        assert Path(str(line[3])).parent.stat().st_mtime_ns == before and not Path("deep").exists()


def test_a_result_beside_which_no_work_can_be_kept_names_the_option(actvar: Actvar, dense_file: Path) -> None:
    Path("made.work").touch()
    result = actvar("convert", dense_file, "--out", "made", *small())
    assert result.exit_code == 2 and "cannot write made.work (--work names another place): " in result.stderr
    assert actvar("convert", dense_file, "--out", "made", "--work", "kept", *small()).exit_code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["dense", "made", "made.work"]


def test_a_work_folder_with_something_else_in_it_is_refused(actvar: Actvar, dense_file: Path) -> None:
    for name in ("photo.png", "state.safetensors.bak"):
        Path("kept").mkdir(exist_ok=True)
        (Path("kept") / name).touch()
        for line in (("convert", dense_file, *small()), ("sweep", dense_file), ("run", "fashion")):
            result = actvar(*line, "--out", "made", "--work", "kept")
            assert result.exit_code == 2 and f"it holds {name}" in result.stderr, result.output
        assert [path.name for path in Path("kept").iterdir()] == [name]
        (Path("kept") / name).unlink()
    assert sorted(path.name for path in Path().iterdir()) == ["dense", "kept"]
