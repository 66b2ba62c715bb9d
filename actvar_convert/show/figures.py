"""What every form of a report shows: figures and names as a person reads them, in the cells of a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from actvar_convert.system.progress import digits

MISSING = "–"  # noqa: RUF001
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


class Unit(NamedTuple):
    """A power of a thousand that several figures share."""

    factor: float
    prefix: str

    @classmethod
    def of(cls, largest: float) -> Unit:
        """The prefix under which the largest figure has at most four digits before the point."""
        for factor, prefix in _PREFIXES:
            if abs(largest) >= 2 * factor or factor == 1.0:
                return cls(factor, prefix)
        raise AssertionError("the last prefix takes everything")

    def show(self, value: float) -> str:
        """The figure in this unit, about four digits."""
        return digits(value / self.factor)


def share(fraction: float | None) -> str:
    """A fraction as a percentage: 0.25 is ``25.0 %``."""
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def change(before: float | None, after: float | None) -> str:
    """Relative change with its sign: from 2 to 1.5 is ``-25.0 %``."""
    if before is None or after is None or before == 0:
        return MISSING
    relative = f"{100 * (after / before - 1):+.1f} %"
    return "0.0 %" if relative in ("+0.0 %", "-0.0 %") else relative


def label(name: str) -> str:
    """A component's name in words."""
    return name.replace("_", " ").replace("vqvae", "VQVAE").replace("adaln", "AdaLN").replace("ffn", "FFN")


def listed(values: Sequence[float]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: heading, with the unit; a narrow form may break it at a newline.
        words: left-aligned words, which may wrap, instead of right-aligned figures.
    """

    name: str
    words: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what people read.
        value: the figure behind the text; None: the text is all.
        bar: 0 to 1: length of a bar beside the figures, in a map the depth of colour; None: nothing is drawn.
        hint: what a pointer at the cell shows.
    """

    text: str
    value: float | str | None = None
    bar: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        cells: one for every column.
        total: sums up what stands above it.
    """

    cells: tuple[Cell, ...]
    total: bool = False


@dataclass(frozen=True)
class Table:
    """What every form of a report shows.

    Attributes:
        title: one line.
        columns: the first names the line. A table whose columns have no names is shown without a heading.
        rows: in order.
        notes: sentences that belong below it.
        bars: what the lengths of the bars mean, if the columns do not say it.
        map: cells are coloured by ``Cell.bar`` instead of having bars beside them.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    bars: str = ""
    map: bool = False

    @property
    def drawn(self) -> tuple[int, ...]:
        """Columns with a bar in any row."""
        return tuple(i for i in range(len(self.columns)) if any(row.cells[i].bar is not None for row in self.rows))

    def to_csv(self) -> str:
        """Headings and lines; figures as they are, without rounding."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.name.replace("\n", " ") for column in self.columns])
        writer.writerows([cell.text if cell.value is None else cell.value for cell in row.cells] for row in self.rows)
        return out.getvalue()


def columns(*names: str, words: int = 1) -> tuple[Column, ...]:
    """Columns by name, of which the first ``words`` are words."""
    return tuple(Column(name, words=index < words) for index, name in enumerate(names))


def row(*cells: str | Cell, total: bool = False) -> Row:
    """A line of cells, and of plain text."""
    return Row(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells), total)


def figure(value: float | None, show: Callable[[float], str] = digits, bar: float | None = None) -> Cell:
    """A figure and its text; a dash if it was not measured."""
    return Cell(MISSING) if value is None else Cell(show(value), value, bar)
