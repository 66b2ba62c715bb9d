"""How the command ends: exit codes, messages without traceback, data and progress on their own streams."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from actvar_convert.errors import ChecksFailed, InputError, Interrupted
from actvar_convert.system import device as runtime
from actvar_convert_cli.console import GRACE, ActvarGroup, show_text
from actvar_convert_cli.main import main
from actvar_convert_cli.options import Verbose, several

from .conftest import Actvar

app = typer.Typer(cls=ActvarGroup)


@app.command()
def end(how: str, out: str = "", verbose: Verbose = False) -> None:
    """A command that ends in every way there is."""
    if how == "input":
        raise InputError("cannot use it:", ["one", "two"])
    if how == "check":
        raise ChecksFailed("1 of 1 checks failed")
    if how == "stopped":
        raise Interrupted("stopped at step 3 of 9; all done so far is on disk")
    if how == "keys":
        raise KeyboardInterrupt
    if how == "terminated":
        signal.raise_signal(signal.SIGTERM)
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")
    if how == "full, no name":
        raise OSError(errno.ENOSPC, "No space left on device")
    if how in ("EACCES", "EROFS", "ENOENT", "EIO"):
        raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)), "/somewhere/file")
    if how == "memory":
        torch.empty(10**14)
    if how == "memory of a GPU":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nMore about it.")
    if how == "memory of an array":
        raise MemoryError
    if how == "shapes":
        torch.empty(2, 3) @ torch.empty(2, 3)
    if how == "bug":
        raise ZeroDivisionError
    show_text("data\n")


@app.command()
def other() -> None:
    """Makes ``end`` a sub-command."""


FULL = "the disk is full. Free some space, or choose a folder elsewhere."


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("well", 0, ""),
        ("input", 2, "actvar: cannot use it:\n  - one\n  - two\n"),
        ("check", 3, "actvar: 1 of 1 checks failed\n"),
        ("full", 2, f"actvar: cannot use /somewhere/file: {FULL}\n"),
        ("full, no name", 2, f"actvar: cannot use: {FULL}\n"),
        ("EACCES", 2, "actvar: cannot use /somewhere/file: no permission. Change its permissions, or choose another "
         "place.\n"),
        ("EROFS", 2, "actvar: cannot use /somewhere/file: the file system is read-only. Choose a folder elsewhere.\n"),
        ("ENOENT", 2, "actvar: cannot use /somewhere/file: no such file or folder. Check the path.\n"),
        ("EIO", 2, "actvar: cannot use /somewhere/file: Input/output error. Check the path and the disk.\n"),
        ("keys", 130, "actvar: stopped\n"),
        ("terminated", 130, "actvar: stopped\n"),
    ],
)  # fmt: skip
def test_exit_codes_and_messages(how: str, code: int, message: str) -> None:
    arguments = ["end", how, "--out", "a b"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (code, message)
    assert result.stdout == ("data\n" if code == 0 else "")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("memory", "can't allocate memory: you tried to allocate 400000000000000 bytes. Error code 12"),
        ("memory of a GPU", "CUDA out of memory. Tried to allocate 9.00 GiB.\n"),
        ("memory of an array", "out of memory\n"),
    ],
)
def test_memory_that_runs_out_is_said_in_a_message(how: str, said: str) -> None:
    result = CliRunner().invoke(app, ["end", how])
    assert result.exit_code == 2 and result.stderr.startswith(f"actvar: memory ran out: {said}")
    assert "Ask for less at once" in result.stderr and "More about it" not in result.stderr


@pytest.mark.parametrize(
    ("line", "resumed"),
    [
        *(([name], False) for name in ("sample", "inspect", "report-flops", "recipes", "evaluate")),
        *(([name], True) for name in ("run", "distill", "sweep")),
        (["evaluate", "--cache", "a b"], True),
    ],
)
def test_only_what_goes_on_says_so(line: list[str], resumed: bool) -> None:
    commands = typer.Typer(cls=ActvarGroup)

    def stopped(cache: str = "") -> None:
        raise KeyboardInterrupt

    for name in ("sample", "inspect", "report-flops", "recipes", "evaluate", "run", "distill", "sweep"):
        commands.command(name)(stopped)
    result = CliRunner().invoke(commands, line)
    again = f"To go on, give the same line again:\n  {shlex.join(['actvar', *line])}\n" if resumed else ""
    assert (result.exit_code, result.stderr) == (130, f"actvar: stopped\n{again}")


def test_other_errors_of_torch_are_not_taken_for_it() -> None:
    result = CliRunner().invoke(app, ["end", "shapes"])
    assert isinstance(result.exception, RuntimeError) and "memory" not in result.stderr


def launch(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int = 4) -> None:
    """The environment of one of several processes, as torchrun leaves it."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", processes), ("MASTER_ADDR", "x"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", ["run", "sample"])
def test_the_result_of_shared_work_is_printed_once_and_all_else_by_everyone(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    commands = typer.Typer(cls=ActvarGroup)
    commands.command(name)(lambda: show_text("data"))
    commands.command("other")(lambda: None)
    for rank, said in ((0, "data\n"), (1, "" if name == "run" else "data\n")):
        launch(monkeypatch, rank)
        assert CliRunner().invoke(commands, [name]).stdout == said


def test_a_rank_without_a_launch_is_ignored_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, ["end", "well"])
    assert (result.exit_code, result.stdout) == (0, "data\n") and result.stderr.startswith(
        "RANK=1 in the environment is"
    )
    monkeypatch.setenv("WORLD_SIZE", "abc")
    result = CliRunner().invoke(app, ["end", "well"])
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.startswith("actvar: WORLD_SIZE=abc")


def test_of_several_processes_the_first_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the launcher to end them, and speak only if it does not: then the trouble is theirs alone."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    launch(monkeypatch, 0)
    assert CliRunner().invoke(app, ["end", "input"]).stderr.startswith("actvar: cannot use it:") and not waited
    launch(monkeypatch, 3)
    for how, said in (("input", "cannot use it:\n"), ("full", "cannot use /somewhere/file: the disk is full")):
        assert CliRunner().invoke(app, ["end", how]).stderr.startswith(f"actvar, process 3: {said}")
    assert waited == [GRACE, GRACE]
    assert CliRunner().invoke(app, ["end", "keys"]).stderr == "", "a launcher stops all of them"


def test_a_launcher_still_ends_a_process_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: found.append(signal.getsignal(signal.SIGTERM)))
    launch(monkeypatch, 3)
    assert CliRunner().invoke(app, ["end", "input"]).exit_code == 2 and found == [signal.SIG_DFL]


def test_an_interrupted_run_says_how_it_goes_on() -> None:
    result = CliRunner().invoke(app, ["end", "stopped"])
    assert result.exit_code == 130
    assert result.stderr.startswith("actvar: stopped at step 3 of 9") and result.stderr.endswith(
        "  actvar end stopped\n"
    )


def test_verbose_adds_the_traceback() -> None:
    result = CliRunner().invoke(app, ["end", "input", "--verbose"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "actvar: cannot use it:" in result.stderr


def test_a_fault_of_our_own_is_not_dressed_up() -> None:
    assert isinstance(CliRunner().invoke(app, ["end", "bug"]).exception, ZeroDivisionError)


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["nonsense"], 2)])
def test_one_of_several_processes_ends_without_clean_up(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(runtime, "end_process", ended.append)
    monkeypatch.setattr(sys, "argv", ["actvar", *arguments])
    for processes, expected in ((1, []), (4, [code])):
        launch(monkeypatch, 0, processes)
        with pytest.raises(SystemExit) as caught:
            main()
        assert (caught.value.code or 0, ended) == (code, expected)


def test_lists_in_options() -> None:
    assert several("0, 1,2", "--seeds", int) == (0, 1, 2)
    with pytest.raises(typer.BadParameter, match="not a list"):
        several("0,x", "--seeds", int)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["report-flops"],
        ["report-flops", "var-d16", "--format", "xml"],
        ["report-flops", "nowhere.pth"],
        ["inspect", "nowhere.pth"],
        ["convert", "nowhere.pth", "--out", "x"],
        ["distill", "nowhere"],
        ["sweep", "nowhere.pth"],
        ["sweep", "nowhere.yaml"],
        ["sweep", "fashion", "--reductions", "0.1,x"],
        ["sweep", "fashion", "--reductions", "1.5"],
        ["evaluate", "nowhere", "--seeds", "1,x"],
        ["evaluate", "nowhere"],
        ["benchmark", "nowhere"],
        ["sample", "nowhere"],
        ["sample", "nowhere", "--top-p", "2"],
        ["run", "nowhere.yaml"],
        ["run", "fashion", "--set", "distill.stage2.stpes=3"],
        ["recipes", "show", "nowhere.yaml"],
        ["recipes", "copy", "fashoin"],
        ["recipes", "validate", "fashion", "nowhere.yaml"],
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_2_and_one_message(actvar: Actvar, tmp_path: Path, arguments: list[str]) -> None:
    result = actvar(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr and "Traceback" not in result.output
    assert not any(tmp_path.iterdir()), "a refused command left something behind"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a file system of Linux")
def test_a_place_that_takes_no_folder_is_no_full_disk(actvar: Actvar) -> None:
    result = actvar("convert", "fashion", "--out", "/proc/xx")
    assert result.exit_code == 2
    assert result.stderr == "actvar: cannot write /proc/xx: /proc takes no new folders. Choose another place.\n"


def test_all_problems_of_a_recipe_are_named(actvar: Actvar) -> None:
    result = actvar("run", "fashion", "--set", "distill.stage2.stpes=3", "--set", "seed=-1", "--set", "data.images=''")
    assert result.exit_code == 2 and result.stdout == ""
    for said in ("did you mean distill.stage2.steps?", "seed: given -1", "data.images: given"):
        assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--labels", "10"), "labels must be a whole number within -1 to 9, got 10"),
        (("--labels", "0,-2"), "labels must be a whole number within -1 to 9, got -2"),
        (("--out", "q.txt"), "q.txt is no name for the picture, a PNG file. Give a name that ends in .png."),
        (("--out", "."), ". is no name for the picture"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_work(
    actvar: Actvar, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = actvar("sample", "fashion", *arguments, "-q")
    assert result.exit_code == 2 and result.stderr.startswith(f"actvar: {said}") and not any(tmp_path.iterdir())
