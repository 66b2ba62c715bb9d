"""Pictures of curves: measures over one quantity, under each other, with error bars; PNG.

What a page of the HTML report shows is drawn in ``actvar_convert.show.charts``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from actvar_convert.measure.sweep_report import SweepReport

WIDTH_INCHES = 6.4
PANEL_INCHES = 2.3
DOTS_PER_INCH = 120


class CurvePoint(NamedTuple):
    """One measurement and its standard error (0: exact)."""

    x: float
    y: float
    error: float = 0.0


class Panel(NamedTuple):
    """One measure.

    Attributes:
        label: of the vertical axis, with the unit.
        points: in ascending x.
        limit: a level to draw as a line; None: none.
    """

    label: str
    points: Sequence[CurvePoint]
    limit: float | None = None


def curves_picture(title: str, x_label: str, panels: Sequence[Panel], marked: float | None = None) -> bytes:
    """Panels under each other over one horizontal axis; a PNG.

    Args:
        title: above all.
        x_label: of the horizontal axis, with the unit.
        panels: at least one.
        marked: the x of a point to circle in every panel.
    """
    from matplotlib.figure import Figure  # takes a second to import, and few commands need it

    size = (WIDTH_INCHES, 0.8 + len(panels) * PANEL_INCHES)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, fontsize=10)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        xs, ys, errors = ([point[i] for point in panel.points] for i in range(3))
        axes.errorbar(xs, ys, yerr=errors, marker="o", markersize=4, capsize=3, linewidth=1.3, color="#1f5fa8")
        if panel.limit is not None:
            axes.axhline(panel.limit, linestyle="--", linewidth=1, color="#b03a2e")
        for point in panel.points:
            if marked is not None and point.x == marked:
                axes.plot([point.x], [point.y], marker="o", markersize=11, fillstyle="none", color="#b03a2e")
        axes.set_ylabel(panel.label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.4)
    rows[-1].set_xlabel(x_label, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "actvar-convert"})
    return buffer.getvalue()


def sweep_picture(report: SweepReport) -> bytes:
    """Quality against the FLOPs that are saved, the dense model at 0; the largest cut within the limit is circled."""
    kl, top1, fid = [CurvePoint(0, 0)], [CurvePoint(0, 100)], [CurvePoint(0, 0)]
    marked = None
    for point in sorted(report.points, key=lambda point: point.reduction or 0):
        if point.reduction is None or point.kl is None or point.agreement is None:
            continue
        saved = 100 * point.reduction
        if point.target == report.chosen:
            marked = saved
        kl.append(CurvePoint(saved, point.kl.mean, point.kl.standard_error))
        agreement = point.agreement
        top1.append(CurvePoint(saved, 100 * agreement.top1, 100 * (agreement.standard_error or 0)))
        if point.fid is not None:
            fid.append(CurvePoint(saved, 100 * point.fid.increase, 100 * point.fid.jackknife_error))
    panels = [
        Panel("KL, nats per token", kl, limit=report.max_kl),
        Panel("top-1 agreement, %", top1),
        *([Panel("change of FID, %", fid)] if len(fid) > 1 else []),
    ]
    title = f"{report.model}: quality against cost, without training"
    return curves_picture(title, "transformer FLOPs saved, %", panels, marked)
