"""The benchmark of published sizes, on a toy shape: it runs, and its figures are of this run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"


def test_one_command_ends_with_one_table(tmp_path: Path) -> None:
    runpy.run_path(str(SCRIPT))["make_files"]("tiny", tmp_path)  # here, and not in one more process that loads torch
    command = [sys.executable, str(SCRIPT), "--model", "tiny", "--pyramids", "8", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    head, line, *rows = done.stdout.splitlines()
    size = (tmp_path / "var_tiny.pth").stat().st_size
    assert head.startswith(f"tiny: var_tiny.pth of {size / 1e9:.3f} GB") and set(line) == {"-"}
    assert [row.split("  ")[0] for row in rows] == [
        "inspect",
        "convert, 8 calibration pyramids",
        "load the sparse folder, generate one image",
    ]
    for row in rows:
        seconds, peak, ratio = map(float, re.split(r"\s{2,}", row)[1:])
        assert seconds > 0.1 and 0.1 < peak < 8
        assert abs(ratio * size / 1e9 - peak) < 0.02 * peak + 0.01
    assert (tmp_path / "one.png").stat().st_size > 0 and (tmp_path / "sparse" / "config.json").is_file()
    reported = [float(size) for size in re.findall(r"peak memory (\d+) MB", done.stderr)]
    assert len(reported) == 3, "every command says what memory it took"
