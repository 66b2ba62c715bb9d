"""Line charts: SVG for a page, and the picture of a sweep."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from actvar_convert.measure.cuts import SweepReport


class Series(NamedTuple):
    """A line: points (x, y) in ascending x."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, series: Sequence[Series], width: int = 360, height: int = 170) -> str:
    """An SVG line chart with its own axes; the scale of y is logarithmic if all values are positive and spread far.

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


def sweep_picture(report: SweepReport) -> bytes:
    """Quality against the FLOPs that are saved, with standard errors, the dense model at 0; a PNG.

    The largest cut within the limit is circled.
    """
    from matplotlib.figure import Figure  # takes a second to import, and few commands need it

    measured = sorted((p for p in report.points if p.reduction is not None), key=lambda p: p.reduction or 0)
    curves: dict[str, list[tuple[float, float, float]]] = {
        "KL, nats per token": [(0, 0, 0)],
        "top-1 agreement, %": [(0, 100, 0)],
        "change of FID, %": [(0, 0, 0)],
    }
    kl, top1, fid = curves.values()
    for point in measured:
        saved = 100 * (point.reduction or 0)
        if point.kl is not None:
            kl.append((saved, point.kl.mean, point.kl.standard_error))
        if point.agreement is not None:
            top1.append((saved, 100 * point.agreement.top1, 100 * (point.agreement.standard_error or 0)))
        if point.fid is not None:
            fid.append((saved, 100 * point.fid.increase, 100 * point.fid.jackknife_error))
    if len(fid) == 1:
        del curves["change of FID, %"]
    marked = [100 * (point.reduction or 0) for point in measured if point.target == report.chosen]

    figure = Figure(figsize=(6.4, 0.8 + 2.3 * len(curves)), dpi=120, layout="constrained")
    figure.suptitle(f"{report.model}: quality against cost, without training", fontsize=10)
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        xs, ys, errors = zip(*points, strict=True)
        axes.errorbar(xs, ys, yerr=errors, marker="o", markersize=4, capsize=3, linewidth=1.3, color="#1f5fa8")
        circled = [(x, y) for x, y in zip(xs, ys, strict=True) if x in marked]
        axes.plot([x for x, _ in circled], [y for _, y in circled], "o", ms=11, fillstyle="none", color="#b03a2e")
        axes.set_ylabel(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.4)
    if report.max_kl is not None:
        panels[0].axhline(report.max_kl, linestyle="--", linewidth=1, color="#b03a2e")
    panels[-1].set_xlabel("transformer FLOPs saved, %", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "actvar-convert"})
    return buffer.getvalue()
