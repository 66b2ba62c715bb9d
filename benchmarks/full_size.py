"""Time and memory of a published model's conversion at its exact size, with random weights instead of the real ones.

    python benchmarks/full_size.py --model d16

Makes the transformer and its tokenizer as official files (fp32 .pth, plain state dicts), then runs what a person would:
inspect, convert with 64 calibration pyramids that the model samples itself, loading the sparse folder and generating
one image. Every step is a process of its own; seconds are wall-clock time, memory is the step's peak resident set as
the system accounts it. Random weights cost what real ones cost; the images are
noise.

Needs disk for two copies of the model (d16 3.4 GB, d30 18 GB, d36 21 GB). On two cores d16 takes minutes, nearly all of
them in sampling: 64 pyramids at about 0.6 TFLOP each. Ends with one table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

MODELS = ("d16", "d20", "d24", "d30", "d36")
TINY = "tiny"
"""A toy shape, to see in seconds whether the benchmark works."""

TINY_SETTINGS = ("name=tiny", "experts.count=8", "gate.rank=4", "budget={reduction: 0.1, gate_keep: 0.7}")


class Step(NamedTuple):
    """What one process took."""

    name: str
    seconds: float
    peak_bytes: int


def make_files(model: str, folder: Path) -> None:
    """Writes ``var_MODEL.pth`` and ``vae_MODEL.pth`` with random weights of the exact shapes."""
    import torch

    from actvar_convert.files.layout import official_config
    from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
    from actvar_convert.models.var.network import VARTransformer
    from actvar_convert.models.var.tokenizer import VQVAE

    if model == TINY:
        sides = (1, 2, 3, 4)
        transformer = TransformerConfig(
            depth=3, width=64, heads=2, hidden=256, sides=sides, vocab=64, z_channels=8, classes=10
        )
        tokenizer = TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=64, z_channels=8, sides=sides)
    else:
        transformer, tokenizer = official_config(f"var-{model}")
    torch.manual_seed(0)
    network = VARTransformer(transformer)
    network.initialise(torch.Generator().manual_seed(0))
    torch.save(network.state_dict(), folder / f"var_{model}.pth")
    torch.save(VQVAE(tokenizer).state_dict(), folder / f"vae_{model}.pth")


def measure(name: str, command: list[str]) -> Step:
    """Runs a command and reads from the system what it took.

    Raises:
        SystemExit: the command failed; its output says why.
    """
    print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} ended with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Step(name, seconds, usage.ru_maxrss * unit)


def commands(model: str, folder: Path, pyramids: int) -> dict[str, list[str]]:
    """The steps that are measured, in order."""
    actvar = [sys.executable, "-m", "actvar_convert_cli"]
    source, sparse = str(folder / f"var_{model}.pth"), str(folder / "sparse")
    settings = [f"calibration.pyramids={pyramids}", *(TINY_SETTINGS if model == TINY else ())]
    tokenizer = str(folder / f"vae_{model}.pth")
    convert = [*actvar, "convert", source, "--vae", tokenizer, "--out", sparse, "--device", "cpu"]
    picture = str(folder / "one.png")
    return {
        "inspect": [*actvar, "inspect", source],
        f"convert, {pyramids} calibration pyramids": [
            *convert,
            *(part for setting in settings for part in ("--set", setting)),
        ],
        "load the sparse folder, generate one image": [
            *actvar, "sample", sparse, "--labels", "0", "--out", picture, "--device", "cpu",
        ],
    }  # fmt: skip


def table(model: str, size: int, steps: list[Step]) -> str:
    """The figures as text; memory also as a multiple of the transformer's file."""
    rows = [(f"{model}: var_{model}.pth of {size / 1e9:.3f} GB", "seconds", "peak GB", "x file")]
    rows += [
        (step.name, f"{step.seconds:.1f}", f"{step.peak_bytes / 1e9:.2f}", f"{step.peak_bytes / size:.2f}")
        for step in steps
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time and peak memory of inspecting, converting and running a model of published size on the CPU."
    )
    parser.add_argument("--model", default="d16", choices=(*MODELS, TINY), metavar="|".join(MODELS))
    parser.add_argument("--pyramids", type=int, default=64, help="calibration pyramids")
    parser.add_argument("--folder", type=Path, help="where files go and stay; by default a temporary folder")
    parser.add_argument("--only-make", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only_make:
        make_files(given.model, given.folder)
        return
    folder = given.folder or Path(tempfile.mkdtemp(prefix="actvar-full-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"var_{given.model}.pth"
    try:
        if not source.exists():
            itself = [sys.executable, __file__, "--only-make", "--model", given.model, "--folder", str(folder)]
            measure("making the files", itself)
        shutil.rmtree(folder / "sparse", ignore_errors=True)
        steps = [measure(name, line) for name, line in commands(given.model, folder, given.pyramids).items()]
        print(table(given.model, source.stat().st_size, steps))
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
