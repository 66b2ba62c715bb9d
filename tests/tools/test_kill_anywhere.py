"""Eight strikes at commands at work: the same line again ends as if nothing had happened."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from .conftest import ROOT


@pytest.mark.parametrize(
    ("commands", "faults", "few"),
    [(["run", "convert", "distill", "sweep"], ["kill"], 8), (["distill"], ["term", "full", "readonly", "changed"], 4)],
)
def test_a_command_that_is_struck_anywhere_ends_like_one_that_is_not(
    commands: list[str], faults: list[str], few: int
) -> None:
    program = [sys.executable, str(ROOT / "tools" / "kill_anywhere.py")]
    done = subprocess.run(
        [*program, *commands, "--faults", ",".join(faults), "--few", str(few)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    each = few // (len(commands) * len(faults))
    assert re.findall(r"(\w+ \w+): (\d+ of \d+) survived", done.stdout) == [
        (f"{name} {fault}", f"{each} of {each}") for name in commands for fault in faults
    ]
