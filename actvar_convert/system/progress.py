"""How long work tells how far it is: bars on a terminal, plain lines elsewhere, JSON lines for metrics on disk.

Everything here goes to stderr or to a file; stdout belongs to the data.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from actvar_convert.system.atomic import write_whole


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1) -> None:
        """Says that ``n`` more steps are done."""

    def note(self, text: str) -> None:
        """Shows a few words beside the bar, such as the current loss."""


class Progress(Protocol):
    """Where a library function reports to. Tasks may be nested."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A task of ``total`` steps (None: unknown), under way for as long as the ``with`` block runs."""

    def say(self, text: str) -> None:
        """Leaves one line for the reader, above any bar."""


class _SilentTask:
    def advance(self, n: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class SilentProgress:
    """Reports nothing; the default of the library."""

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        yield _SilentTask()

    def say(self, text: str) -> None:
        pass


class _Bar:
    """A task shown as a bar."""

    def __init__(self, bars: Bars, row: TaskID) -> None:
        self.bars, self.row = bars, row

    def advance(self, n: int = 1) -> None:
        self.bars.advance(self.row, n)

    def note(self, text: str) -> None:
        self.bars.update(self.row, note=text)


class _Lines:
    """A task shown as a plain line every few seconds."""

    def __init__(
        self,
        description: str,
        total: int | None,
        interval: float,
        write: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.description, self.total, self.interval, self.write, self.clock = description, total, interval, write, clock
        self.done, self.words = 0, ""
        self.started = self.written = clock()
        self.first: tuple[float, int] | None = None
        self.last_line = ""

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = self.clock()
        self.first = self.first or (now, self.done)
        if now - self.written >= self.interval and self.done != self.total:
            self.written, self.last_line = now, self.line()
            self.write(self.last_line)

    def end(self) -> None:
        """Says how far the task was, unless the last line has said just that."""
        if self.line(over=True) != self.last_line:
            self.write(self.line(over=True))

    def note(self, text: str) -> None:
        self.words = text

    def line(self, over: bool = False) -> str:
        """How far the task is, or was when it ended, in one line."""
        now = self.clock()
        count = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        parts = [count, duration(now - self.started)]
        if self.total and self.first is not None and self.first[1] < self.done < self.total and not over:
            since, before = self.first  # the first advance may be what an earlier run did, in no time
            left = (now - since) / (self.done - before) * (self.total - self.done)
            parts.append(f"about {duration(left)} left")
        if self.words:
            parts.append(self.words)
        return f"{self.description}: {', '.join(parts)}"


class TerminalProgress:
    """Reports on stderr: bars with the remaining time on a terminal, a plain line every few seconds without one.

    Args:
        console: where to; stderr by default.
        interval: seconds between two plain lines of a task.
    """

    def __init__(
        self, console: Console | None = None, interval: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self.interval, self.clock = interval, clock
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
            redirect_stdout=False,
            speed_estimate_period=120,
        )
        self.open = 0

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        lines = _Lines(description, total, self.interval, self.say, self.clock)
        task: Task = lines
        if self.console.is_terminal:
            if self.open == 0:
                self.bars.start()
            self.open += 1
            task = _Both(_Bar(self.bars, self.bars.add_task(description, total=total, note="")), lines)
            lines.interval = math.inf
        try:
            yield task
        finally:
            if isinstance(task, _Both):
                self.bars.remove_task(task.bar.row)
                self.open -= 1
                if self.open == 0:
                    self.bars.stop()
            lines.end()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Both:
    """A bar while the task runs, and the count for the line that stays when it ends."""

    def __init__(self, bar: _Bar, lines: _Lines) -> None:
        self.bar, self.lines = bar, lines

    def advance(self, n: int = 1) -> None:
        self.bar.advance(n)
        self.lines.advance(n)

    def note(self, text: str) -> None:
        self.bar.note(text)
        self.lines.note(text)


def duration(seconds: float) -> str:
    """Seconds as a person writes them: ``4.2 s``, ``3 min 20 s``, ``1 h 05 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


Metric = float | int | str | bool | None | Sequence[float]


class MetricsLog:
    """Append-only metrics, one JSON object per line. A line torn by a crash is cut off when the file is opened again.

    Args:
        path: the file, ``metrics.jsonl`` by custom; made when missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_end()
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, **values: Metric) -> None:
        """Appends one line; numbers that JSON lacks (infinite, not a number) become null."""
        self._file.write(json.dumps({name: _finite(value) for name, value in values.items()}) + "\n")
        self._file.flush()

    def read(self) -> list[dict[str, Metric]]:
        """All lines, oldest first; lines that somebody edited into something else are left out."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines() if _is_object(line)]

    def rewind(self, step: int, **where: Metric) -> None:
        """Drops what was written past a step, for a run that goes on from there.

        Args:
            step: lines whose ``step`` is larger are dropped.
            where: only lines with these values are dropped, such as ``stage="stage2"``.
        """
        kept = [line for line in self.read() if not self._past(line, step, where)]
        self._file.close()
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    @staticmethod
    def _past(line: Mapping[str, Metric], step: int, where: Mapping[str, Metric]) -> bool:
        at = line.get("step")
        matches = all(line.get(name) == value for name, value in where.items())
        return matches and isinstance(at, int | float) and at > step

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cut_torn_end(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        size = sum(map(len, lines))
        while lines and not (lines[-1].endswith(b"\n") and _is_object(lines[-1])):
            lines.pop()
        if sum(map(len, lines)) < size:
            os.truncate(self.path, sum(map(len, lines)))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _finite(value: Metric) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def digits(value: float) -> str:
    """A number of about four significant digits, without an exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    places = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 else 4
    if size < 0.001:
        return f"{value:.2g}"
    return f"{value:,.{places}f}"
