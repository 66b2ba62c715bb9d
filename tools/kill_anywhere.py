"""Faults at every place: is the result of a command that was struck and given again that of an undisturbed one?

    python tools/kill_anywhere.py                     # all commands, killed at each operation and 100 random moments
    python tools/kill_anywhere.py run --random 0      # one command
    python tools/kill_anywhere.py --faults full,readonly --every 5

A small job is made anew for each trial: ``run``, ``convert``, ``distill`` or ``sweep`` of a tiny model. A trial strikes
the command, gives the same line again without the fault, and compares all files: the same names, the same bytes but for
times that were measured. Each file operation (a file opened to be written, renamed, removed; a folder made, removed;
contents forced onto the disk) is a place to strike; so are random moments. The faults:

- ``kill``: SIGKILL before the operation, or at a moment
- ``term``: SIGTERM, which the command has to end by itself
- ``full``: from the operation on the disk is full
- ``readonly``: from the operation on the file system is read-only
- ``changed``: SIGKILL; then the line is given with another seed before it is given as it was

The modules are imported once, and every trial is a fork. A line per command and fault says how many trials there were
and how many ended like the undisturbed command; each other one has a line of its own. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with threads cannot be forked safely

import torch
from safetensors.torch import save_file

from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert_cli.main import app

SIDES = (1, 2, 3)
LIMIT = 120.0
"""Seconds after which a command hangs."""

RECIPE = """
name: mine
model: dense/var.safetensors
experts: {count: 8}
gate: {rank: 2}
budget: {reduction: 0.1, pyramids: 4}
calibration: {pyramids: 8, batch: 4}
data: {pyramids: 8, batch: 4}
distill:
  stage1: {steps: 2, batch: 4}
  stage2: {steps: 2, batch: 4}
evaluate: {images: 20, held_out: 4, batch: 4}
benchmark: {batches: [1]}
"""
LINES = {
    "run": ["run", "mine.yaml", "--out", "made", "-q"],
    "convert": ["convert", "dense/var.safetensors", "--recipe", "mine.yaml", "--out", "made", "-q"],
    "distill": ["distill", "sparse", "--out", "older", "-q"],
    "sweep": ["sweep", "mine.yaml", "--reductions", "0.1,0.2", "--out", "made", "-q"],
}
MEASURED = ("benchmark.json", "report.html", "README.md")
"""Files that say how long something took: they have to be there."""

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "fsync")
REFUSED = {"full": (errno.ENOSPC, ("open", "os.mkdir", "fsync")), "readonly": (errno.EROFS, OPERATIONS)}
"""What the operating system answers, and to which operations."""

Files = dict[str, bytes]


class Strike(NamedTuple):
    """A fault, and where: at a file operation, counted from 1, or after some seconds."""

    fault: str
    operation: int | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.fault} at " + (f"{self.seconds:.2f} s" if self.operation is None else f"#{self.operation}")


class Ended(NamedTuple):
    """How a command ended: its exit code (negative: by a signal), the operations that it did, what it said."""

    code: int
    operations: list[str]
    said: str


class Operations:
    """Counts the file operations of this process in a folder, and strikes at one of them."""

    def __init__(self, root: Path, strike: Strike | None) -> None:
        self.root, self.strike, self.seen = str(root), strike, []
        fsync = os.fsync

        def watched(handle: int) -> None:
            self.hook("fsync", ("",))
            fsync(handle)

        os.fsync = watched
        sys.addaudithook(self.hook)

    seen: list[str]

    def hook(self, event: str, given: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path = os.fsdecode(given[0]) if isinstance(given[0], str | bytes) else ""
        if os.path.isabs(path) and not path.startswith(self.root):
            return
        self.seen.append(f"{event} {os.path.basename(path)}")
        strike = self.strike
        if strike is None or strike.operation is None or len(self.seen) < strike.operation:
            return
        if strike.fault in REFUSED:
            number, operations = REFUSED[strike.fault]
            if event in operations:
                raise OSError(number, os.strerror(number), path or None)
        elif len(self.seen) == strike.operation:
            os.kill(os.getpid(), signal.SIGTERM if strike.fault == "term" else signal.SIGKILL)


def make_inputs(folder: Path) -> None:
    """The files that the commands begin with: a dense model of two blocks, a recipe."""
    config = TransformerConfig(depth=2, width=32, heads=2, hidden=64, sides=SIDES, vocab=16, z_channels=8, classes=3)
    torch.manual_seed(0)
    transformer = VARTransformer(config)
    transformer.initialise(torch.Generator().manual_seed(0))
    tokenizer = VQVAE(TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=16, z_channels=8, sides=SIDES))
    model = Model(transformer, tokenizer).eval()
    (folder / "dense").mkdir(parents=True)
    for name, part in {"var": model.transformer, "vae": model.tokenizer}.items():
        tensors = {key: tensor.contiguous() for key, tensor in part.state_dict().items()}
        save_file(tensors, folder / "dense" / f"{name}.safetensors")
    (folder / "mine.yaml").write_text(RECIPE)


def warm(place: Path) -> None:
    """Makes converted models among the inputs, and goes through a run: with all modules loaded forks are quick."""
    shutil.copytree(place / "inputs", place / "warm")
    convert = ["convert", "dense/var.safetensors", "--recipe", "mine.yaml", "--out", "sparse", "-q"]
    for folder, line in (("inputs", convert), ("warm", LINES["run"])):
        with contextlib.chdir(place / folder), contextlib.redirect_stdout(io.StringIO()):
            try:
                app(line, prog_name="actvar")
            except SystemExit as end:
                if end.code:
                    raise
    shutil.copytree(place / "inputs" / "sparse", place / "inputs" / "older")
    if threading.active_count() > 1:
        raise SystemExit("a process with threads cannot be forked safely")


def run_line(line: Sequence[str], folder: Path, strike: Strike | None = None) -> Ended:
    """Gives a command line in a folder, in a fork of this process."""
    log = folder.with_name("log")
    log.write_text("")
    begin, child = time.monotonic(), os.fork()
    if not child:
        _be_command(line, folder, strike, log)
    struck = False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        passed = time.monotonic() - begin
        if strike is not None and strike.operation is None and passed >= strike.seconds and not struck:
            os.kill(child, signal.SIGTERM if strike.fault == "term" else signal.SIGKILL)
            struck = True
        if passed > LIMIT:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    said, _, operations = log.read_text(errors="replace").partition("\0")
    return Ended(os.waitstatus_to_exitcode(status), operations.splitlines(), said)


def _be_command(line: Sequence[str], folder: Path, strike: Strike | None, log: Path) -> None:
    """Is the command until the process ends; what it says and its operations, after a zero, go to the log."""
    code = 1
    try:
        os.chdir(folder)
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["actvar", *line]
        operations = Operations(folder, strike)
        try:
            app(list(line), prog_name="actvar")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(handle, ("\0" + "\n".join(operations.seen)).encode())
    finally:
        os._exit(code)


def files_of(folder: Path) -> Files:
    """Every file of a folder by its path in it; folders end with a slash."""
    return {
        path.relative_to(folder).as_posix() + "/" * path.is_dir(): b"" if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def differences(found: Files, expected: Files) -> list[str]:
    """What is not as in the undisturbed folder."""
    names = [f"stray: {name}" for name in sorted(found.keys() - expected.keys())]
    names += [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    return names + [
        f"differs: {name}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name] and Path(name).name not in MEASURED
    ]


class Bench:
    """One command in a folder that is made anew for each trial."""

    def __init__(self, name: str, place: Path) -> None:
        self.line, self.inputs, self.folder = LINES[name], place / "inputs", place / "job"
        begin = time.monotonic()
        self.whole, self.operations = self._undisturbed(self.line)
        self.seconds = time.monotonic() - begin
        self.other = [*self.line, "--set", "seed=1"]
        self.codes: collections.Counter[int] = collections.Counter()
        self._changed: Files | None = None

    def _undisturbed(self, line: Sequence[str]) -> tuple[Files, list[str]]:
        self._begin()
        ended = run_line(line, self.folder)
        if ended.code:
            raise SystemExit(f"{' '.join(line)} fails by itself:\n{ended.said}")
        return files_of(self.folder), ended.operations

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.inputs, self.folder)

    def trial(self, strike: Strike) -> list[str]:
        """What is wrong after a strike and the line again; nothing if all is as without it."""
        self._begin()
        first = run_line(self.line, self.folder, strike)
        self.codes[first.code] += 1
        allowed = {"kill": (0, -9), "changed": (0, -9), "term": (0, 130, -15), "full": (0, 2), "readonly": (0, 2)}
        wrong = []
        if first.code not in allowed[strike.fault] or "Traceback" in first.said:
            wrong.append(f"struck it ended with {first.code}: {first.said[-1500:]}")
        if strike.fault == "changed":
            wrong += self._with_another_seed()
        again = run_line(self.line, self.folder)
        if again.code:
            return [*wrong, f"again it ended with {again.code}: {again.said[-1500:]}"]
        return wrong + differences(files_of(self.folder), self.whole)

    def _with_another_seed(self) -> list[str]:
        """What is wrong with the changed line after a kill: it is refused, or makes what it makes undisturbed.

        The folder is then as the kill left it, for the line as it was.
        """
        kept = self.folder.with_name("kept")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.folder, kept)
        changed = run_line(self.other, self.folder)
        wrong = []
        if changed.code == 0:
            found = files_of(self.folder)
            if self._changed is None:
                self._changed, _ = self._undisturbed(self.other)
            wrong = differences(found, self._changed)
            shutil.rmtree(self.folder)
            kept.rename(self.folder)
        elif changed.code != 2 or "Traceback" in changed.said:
            wrong = [f"ended with {changed.code}: {changed.said[-1500:]}"]
        return [f"with another seed {each}" for each in wrong]

    def strikes(self, fault: str, every: int, moments: int, rng: random.Random) -> Iterator[Strike]:
        """Every so manieth operation, then moments at random."""
        yield from (Strike(fault, place + 1) for place in range(0, len(self.operations), every))
        if fault not in REFUSED:
            yield from (Strike(fault, None, rng.uniform(0, self.seconds)) for _ in range(moments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"{', '.join(LINES)}; default: all")
    parser.add_argument("--faults", default="kill", help="comma-separated; default: kill")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="strike at every Nth operation alone")
    parser.add_argument("--random", type=int, default=100, metavar="N", help="random moments per command")
    parser.add_argument("--few", type=int, metavar="N", help="N trials in all, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random")
    args = parser.parse_args()
    wanted, faults = args.commands or list(LINES), args.faults.split(",")
    unknown = [*(set(wanted) - set(LINES)), *(set(faults) - {"kill", "term", "changed", *REFUSED})]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    torch.set_num_threads(1)
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory(prefix="actvar-kill-") as place:
        root = Path(place).resolve()
        make_inputs(root / "inputs")
        warm(root)
        for name in wanted:
            bench = Bench(name, root)
            for fault in faults:
                strikes = list(bench.strikes(fault, args.every, args.random, rng))
                if args.few is not None:
                    strikes = rng.sample(strikes, max(1, args.few // (len(wanted) * len(faults))))
                survived = 0
                bench.codes.clear()
                for strike in strikes:
                    wrong = bench.trial(strike)
                    survived += not wrong
                    if wrong:
                        where = "" if strike.operation is None else f" ({bench.operations[strike.operation - 1]})"
                        print(f"{name}, {strike}{where}:", *wrong, sep="\n    ", flush=True)
                failed += len(strikes) - survived
                codes = ", ".join(f"{count} with {code}" for code, count in sorted(bench.codes.items()))
                place = f"{len(bench.operations)} operations"
                print(f"{name} {fault}: {survived} of {len(strikes)} survived, of {place}; ended {codes}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
