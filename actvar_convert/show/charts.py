"""Pieces of an HTML page: tables with bars in them, heat maps, line charts. Text and numbers stay readable without
colour: every bar and cell carries its figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Bar(NamedTuple):
    """One line of a bar table.

    Attributes:
        name: what the line is about.
        values: one value per series, the lengths of the bars.
        texts: what stands beside the bars, one per column.
    """

    name: str
    values: Sequence[float]
    texts: Sequence[str]


class HeatCell(NamedTuple):
    """One cell of a heat map: its depth of colour from 0 to 1, its figure, and what a pointer at it shows."""

    depth: float
    text: str
    hint: str


class Series(NamedTuple):
    """A line: points (x, y) in ascending x."""

    name: str
    points: Sequence[tuple[float, float]]


def bar_table(caption: str, columns: Sequence[str], bars: Sequence[Bar], series: Sequence[str]) -> str:
    """A table of figures with a column of bars, one bar per series on a line."""
    largest = max((value for bar in bars for value in bar.values), default=0.0) or 1.0
    legend = "".join(f'<span class="key s{i}">{escape(name)}</span>' for i, name in enumerate(series))
    head = "".join(f'<th scope="col" class="number">{escape(column)}</th>' for column in columns)
    lines = []
    for bar in bars:
        drawn = "".join(
            f'<div class="bar s{i}" style="width:{max(100 * value / largest, 0.4 if value else 0):.2f}%"></div>'
            for i, value in enumerate(bar.values)
        )
        cells = "".join(f'<td class="number">{escape(text)}</td>' for text in bar.texts)
        lines.append(
            f'<tr><th scope="row">{escape(bar.name)}</th><td class="bars" aria-hidden="true">{drawn}</td>{cells}</tr>'
        )
    return (
        f'<div class="scroll"><table class="figures drawn"><caption>{escape(caption)} {legend}</caption><thead><tr>'
        f'<td></td><td aria-hidden="true"></td>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def plain_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the line and whose others are figures."""
    head = "".join(
        f'<th scope="col"{" class=number" if index else ""}>{escape(column)}</th>'
        for index, column in enumerate(columns)
    )
    lines = (
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="number">{escape(text)}</td>' for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="figures"><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def heat_map(caption: str, corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[HeatCell]]]) -> str:
    """A table whose cells are coloured by depth."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = []
    for name, cells in rows:
        drawn = "".join(
            f'<td style="--depth:{100 * min(max(cell.depth, 0.0), 1.0):.1f}%" title="{escape(cell.hint)}">'
            f"{escape(cell.text)}</td>"
            for cell in cells
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{drawn}</tr>')
    return (
        f'<div class="scroll"><table class="heat"><caption>{escape(caption)}</caption><thead><tr>'
        f'<th scope="col">{escape(corner)}</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def line_chart(title: str, series: Sequence[Series], width: int = 360, height: int = 170) -> str:
    """An SVG line chart with its own axes; the scale of y is logarithmic where all values are positive and spread far.

    Lines are told apart by colour and by dash.
    """
    shown = [Series(each.name, thinned([p for p in each.points if all(map(math.isfinite, p))])) for each in series]
    shown = [each for each in shown if each.points]
    if not shown:
        return ""
    xs = [x for each in shown for x, _ in each.points]
    ys = [y for each in shown for _, y in each.points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > 20
    low, high = min(ys), max(ys)
    left, right, top, bottom = 56, 10, 26, 30

    def across(x: float) -> float:
        return left + (x - min(xs)) / ((max(xs) - min(xs)) or 1) * (width - left - right)

    def down(y: float) -> float:
        at = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / ((high - low) or 1)
        return height - bottom - at * (height - top - bottom)

    middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
    parts = [f'<text x="{left}" y="15" class="title">{escape(title)}</text>']
    for tick in (low, middle, high) if high > low else (low,):
        y = down(tick)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for x, anchor in ((min(xs), "start"), (max(xs), "end")):
        parts.append(f'<text x="{across(x):.1f}" y="{height - 10}" text-anchor="{anchor}">{x:g}</text>')
    for index, each in enumerate(shown):
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in each.points)
        parts.append(f'<polyline class="line s{index}" points="{points}"><title>{escape(each.name)}</title></polyline>')
    named = ", ".join(f"{each.name} from {each.points[0][1]:.3g} to {each.points[-1][1]:.3g}" for each in shown)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{title}: {named}")}">'
        f"{''.join(parts)}</svg>"
    )


def thinned(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most about ``most`` points, each the mean of its neighbours."""
    step = -(-len(points) // most)
    if step <= 1:
        return list(points)
    groups = [points[start : start + step] for start in range(0, len(points), step)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
