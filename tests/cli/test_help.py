"""Help: every command has one, with an example and what usually follows."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import actvar_convert
from actvar_convert_cli.main import app

COMMANDS = ["convert", "distill", "run", "sweep", "report-flops", "evaluate", "benchmark", "inspect", "sample"]
COMMANDS += ["export"]
RECIPES = ["list", "show", "copy", "validate"]


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), prog_name="actvar", env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + [["recipes", name] for name in RECIPES])
def test_every_help_ends_with_an_example_and_what_follows(command: list[str]) -> None:
    *_, example, then = [line.strip() for line in output(*command, "--help").splitlines() if line.strip()]
    assert example.startswith(f"Example: actvar {' '.join(command)}")
    assert then.startswith("Then: actvar ")
    named = then.removeprefix("Then: actvar ").split()
    assert named[0] in COMMANDS or (named[0] == "recipes" and named[1] in RECIPES)


def test_alone_it_shows_the_commands_in_the_usual_order() -> None:
    text = output()
    assert text.strip() == output("--help").strip()
    listed, order = text.split("The usual order:")
    assert all(f" {name} " in listed for name in [*COMMANDS, "recipes"])
    usual = ("recipes list", "report-flops", "sweep", "convert", "evaluate", "sample")
    steps = [order.index(f"actvar {name}") for name in usual]
    assert steps == sorted(steps)


def test_version() -> None:
    assert output("--version").strip() == actvar_convert.__version__


def test_help_is_quick() -> None:
    def once() -> float:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "actvar_convert_cli", "--help"], check=True, capture_output=True, timeout=60
        )
        return time.perf_counter() - begin

    assert min(once() for _ in range(3)) < 5, "help takes seconds: something heavy is imported on the way"


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_the_user_says_otherwise(own: str | None, expected: str) -> None:
    code = "import sys, os, actvar_convert_cli.main; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if own is None else {"OMP_WAIT_POLICY": own}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [expected, "False"], "OpenMP reads it when torch is imported"
