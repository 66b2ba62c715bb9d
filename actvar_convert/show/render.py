"""Reports as tables for a terminal (rich), and the FLOPs report as CSV. Functions return; they do not print."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actvar_convert.cost.flops import Cell, Cost, FlopsReport, ModelCost
from actvar_convert.measure.latency import BenchmarkReport, BenchmarkRow
from actvar_convert.measure.quality_report import QualityReport, RoutingLoad
from actvar_convert.measure.routing import experts_per_token
from actvar_convert.measure.sweep_report import SweepPoint, SweepReport
from actvar_convert.show.wording import (
    MISSING,
    SummaryRow,
    Unit,
    change,
    flops_note,
    label,
    quality_notes,
    quality_rows,
    share,
    summary_rows,
)
from actvar_convert.system.device import memory_text
from actvar_convert.system.progress import digits

MOST_LISTED = 20
"""Entries of a list that an inspection shows before it counts the rest."""


def render_flops_table(report: FlopsReport) -> RenderableType:
    """FLOPs and MACs per component, scale and block; dense beside sparse where there is a plan."""
    parts: list[RenderableType] = [_component_table(report), _scale_table(report), _block_table(report)]
    if report.plans:
        parts.append(_plan_table(report))
    return Group(*parts, _note(flops_note(report)))


def render_quality_table(report: QualityReport) -> RenderableType:
    """Quality of dense and sparse, and per scale how far apart they are."""
    per_scale = _table("against the dense model, per scale", "scale", "KL (nats per token)", "top-1 agreement")
    for scale, (kl, top1) in enumerate(zip(report.kl.per_scale, report.agreement.per_scale, strict=True)):
        per_scale.add_row(str(scale), f"{kl:.4f}", share(top1))
    per_scale.add_section()
    per_scale.add_row("mean", f"{report.kl.mean:.4f}", share(report.agreement.top1))
    of_images = quality_rows(report)
    parts: list[RenderableType] = [_summary_table(_titled("quality", report.plan), of_images)] if of_images else []
    parts.append(per_scale)
    if report.routing:
        parts.append(_routing_table(report.routing))
    if report.plans:
        others = _table("other plans", "plan", "FID dense", "FID sparse", "change", "KL", "top-1 agreement")
        for name, each in report.plans.items():
            fid = each.fid
            figures = (MISSING,) * 3
            if fid is not None:
                figures = f"{fid.dense:.3f}", f"{fid.sparse:.3f}", change(fid.dense, fid.sparse)
            others.add_row(name, *figures, f"{each.kl.mean:.4f}", share(each.agreement.top1))
        parts.append(others)
    return Group(*parts, *(_note(note) for note in (*quality_notes(report), *report.notes)))


def _routing_table(loads: Sequence[RoutingLoad]) -> Table:
    """What the routers of each block chose, over the scales that it routes."""
    heads = "block", "scales", "experts\nper token", "planned", "least\nbalance", "least\nload", "most\nload"
    table = _table("routed experts", *heads)
    for block in sorted({each.block for each in loads}):
        own = [each for each in loads if each.block == block]
        active, planned = experts_per_token(own)
        loaded = [load for each in own for load in each.load]
        scales = ", ".join(str(each.scale) for each in own)
        table.add_row(
            str(block),
            scales,
            *(f"{value:.2f}" for value in (active, planned, min(each.balance for each in own))),
            share(min(loaded)),
            share(max(loaded)),
        )
    return table


def render_benchmark_table(report: BenchmarkReport) -> RenderableType:
    """Latency per batch size and precision, the speed-up, and how much of the promised one it is."""
    tables = [
        _latency_table(report, with_decoder) for with_decoder in sorted({row.with_decoder for row in report.rows})
    ]
    note = (
        f"{report.hardware}, {report.threads} threads, torch {report.torch}. Medians of {report.repeats} runs per "
        "side, alternating; images per second: of the measured model; spread: interquartile range over median. "
        "Promised: dense FLOPs over sparse FLOPs; realised: speed-up over promised."
    )
    return Group(*tables, *_component_times(report), _note(note))


def render_sweep_table(report: SweepReport) -> RenderableType:
    """Cost and quality of every cut; the largest one within the limit is marked."""
    unit = Unit.of(report.dense_flops)
    measured = any(point.fid for point in report.points)
    fid = ("FID\ndense", "FID\nsparse", "change\n%", "error") if measured else ()
    heads = "saved", f"{unit.prefix}FLOPs", "KL, nats\nper token", "error", "top-1\nagreement", "error"
    table = _table(f"quality against cost without training, {report.model}", "asked for", *heads, *fid)
    notes = []
    for point in report.points:
        mark = " *" if point.target == report.chosen else ""
        name = share(point.target) + mark
        if point.kl is None or point.agreement is None or point.flops is None:
            table.add_row(name, "out of reach")
            notes.append(f"{share(point.target)}: {point.problem}")
            continue
        table.add_row(
            name,
            share(point.reduction),
            unit.show(point.flops),
            *(f"{value:.4f}" for value in (point.kl.mean, point.kl.standard_error)),
            *(share(value) for value in (point.agreement.top1, point.agreement.standard_error)),
            *_fid_cells(point),
        )
    if report.max_kl is not None:
        found = "none of these" if report.chosen is None else f"* {share(report.at(report.chosen).reduction)} saved"
        setting = "" if report.chosen is None else f" (--set budget.reduction={report.chosen:g})"
        notes.append(f"Largest cut with a KL of at most {report.max_kl:g}: {found}{setting}.")
    notes.append(
        f"Dense: {unit.show(report.dense_flops)} {unit.prefix}FLOPs per image, transformer with guidance. KL and "
        f"agreement to the dense model on {report.held_out} held-out pyramids, with standard errors; recipe "
        f"{report.recipe}, {report.calibration_pyramids} calibration pyramids, nothing distilled."
    )
    return Group(table, *(_note(note) for note in notes))


def _fid_cells(point: SweepPoint) -> list[str]:
    if point.fid is None:
        return []
    fid, percent = point.fid, (100 * point.fid.increase, 100 * point.fid.jackknife_error)
    return [f"{fid.dense:.3f}", f"{fid.sparse:.3f}", f"{percent[0]:+.1f}", f"{percent[1]:.1f}"]


def render_inspection(inspection: Any) -> RenderableType:
    """What is in a file: every field of an inspection, long lists shortened.

    Args:
        inspection: a mapping, or a pydantic model.
    """
    values = inspection if isinstance(inspection, Mapping) else json.loads(inspection.model_dump_json())
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _flattened(values):
        table.add_row(label(name), Text(text))
    return table


def render_summary(
    flops: FlopsReport, quality: QualityReport | None = None, benchmark: BenchmarkReport | None = None
) -> RenderableType:
    """The one closing table of a run: FLOPs, FID and seconds per image, dense and sparse."""
    return _summary_table(_titled("dense and sparse", flops.plan), summary_rows(flops, quality, benchmark))


def flops_csv(report: FlopsReport) -> str:
    """Every figure of a FLOPs report, one a line.

    Columns: plan (empty for the dense model), part (total, component, scale, block or cell), block, scale, component,
    flops, macs.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["plan", "part", "block", "scale", "component", "flops", "macs"])
    for plan, model in _models(report):
        writer.writerows([plan, *row[:-1], row[-1].flops, row[-1].macs] for row in _lines(model))
    return out.getvalue()


def _models(report: FlopsReport) -> Iterator[tuple[str, ModelCost]]:
    yield "", report.dense
    if report.sparse is not None:
        yield report.plan or "", report.sparse
    for name, other in (report.plans or {}).items():
        yield name, other.sparse


def _lines(model: ModelCost) -> Iterator[tuple[str, int | str, int | str, str, Cost]]:
    yield "total", "", "", "transformer", model.transformer
    if model.end_to_end is not None:
        yield "total", "", "", "end_to_end", model.end_to_end
    yield from (("component", "", "", name, cost) for name, cost in model.components.items())
    for scale in model.per_scale:
        yield from (("scale", "", scale.scale, name, cost) for name, cost in scale.components.items())
    for block in model.per_block:
        yield from (("block", block.block, "", name, cost) for name, cost in block.components.items())
        yield from (("cell", block.block, scale, "", cell) for scale, cell in enumerate(block.scales))


def _component_table(report: FlopsReport) -> Table:
    dense, sparse = report.dense, report.sparse
    unit = Unit.of((dense.end_to_end or dense.transformer).flops)
    table = _cost_table(_titled("per component", report.plan), ["component"], unit, sparse is not None)
    for name, cost in dense.components.items():
        if name == "vqvae_decoder":
            continue
        table.add_row(label(name), *_costs(cost, None if sparse is None else sparse.components[name], unit))
    table.add_section()
    table.add_row("transformer", *_costs(dense.transformer, sparse.transformer if sparse else None, unit), style="bold")
    if dense.end_to_end is not None:
        decoder = dense.components["vqvae_decoder"]
        table.add_row("VQVAE decoder", *_costs(decoder, decoder if sparse else None, unit))
        table.add_row(
            "end to end", *_costs(dense.end_to_end, sparse.end_to_end if sparse else None, unit), style="bold"
        )
    return table


def _scale_table(report: FlopsReport) -> Table:
    unit = Unit.of(max(scale.flops for scale in report.dense.per_scale))
    table = _work_table("per scale", ["scale", "map", "tokens"], unit, report.sparse)
    for index, scale in enumerate(report.dense.per_scale):
        name = str(scale.scale), f"{scale.side}x{scale.side}", str(scale.tokens)
        cells = [block.scales[index] for block in report.sparse.per_block] if report.sparse else []
        table.add_row(*name, *_work(scale, report.sparse.per_scale[index] if report.sparse else None, cells, unit))
    return table


def _block_table(report: FlopsReport) -> Table:
    unit = Unit.of(max(block.flops for block in report.dense.per_block))
    table = _work_table("per block", ["block"], unit, report.sparse)
    for index, block in enumerate(report.dense.per_block):
        sparse = report.sparse.per_block[index] if report.sparse else None
        table.add_row(str(block.block), *_work(block, sparse, sparse.scales if sparse else (), unit))
    return table


def _work_table(title: str, heads: Sequence[str], unit: Unit, sparse: ModelCost | None) -> Table:
    flops = f"{unit.prefix}FLOPs"
    if sparse is None:
        return _table(title, *heads, flops)
    return _table(title, *heads, f"dense\n{flops}", f"sparse\n{flops}", "change", "least\nneurons", "least\ntokens")


def _work(dense: Cost, sparse: Cost | None, cells: Sequence[Cell], unit: Unit) -> list[str]:
    """FLOPs of both sides, their change, and the smallest shares of active neurons and kept tokens among the cells."""
    if sparse is None:
        return [unit.show(dense.flops)]
    least = share(min(cell.active for cell in cells)), share(min(cell.kept for cell in cells))
    return [unit.show(dense.flops), unit.show(sparse.flops), change(dense.flops, sparse.flops), *least]


def _plan_table(report: FlopsReport) -> Table:
    unit = Unit.of(report.dense.transformer.flops)
    table = _table("other plans", "plan", f"transformer {unit.prefix}FLOPs", "saved", "saved end to end")
    for name, plan in (report.plans or {}).items():
        saved, end_to_end = plan.reduction.transformer, plan.reduction.end_to_end
        table.add_row(name, unit.show(plan.sparse.transformer.flops), share(saved), share(end_to_end))
    return table


def _latency_table(report: BenchmarkReport, with_decoder: bool) -> Table:
    rows = [row for row in report.rows if row.with_decoder == with_decoder]
    decoders = ", ".join(dict.fromkeys(row.decoder_dtype for row in rows))
    what = f"latency with decoder in {decoders}" if with_decoder else "latency of tokens alone"
    title = _titled(", ".join((what, *dict.fromkeys(row.device for row in rows), *_graphs(rows))), report.plan)
    ratios = "speed\nup", "prom-\nised", "real-\nised"
    table = _table(title, "dtype", "batch", "dense\nms", "sparse\nms", "images\n/s", *ratios, "spread", "peak\nmemory")
    for row in rows:
        own = row.dense_images_per_second if row.sparse_ms is None else row.sparse_images_per_second
        figures = row.dense_ms, row.sparse_ms, own
        table.add_row(
            row.dtype,
            str(row.batch),
            *(MISSING if figure is None else digits(figure) for figure in figures),
            *(MISSING if ratio is None else f"{ratio:.2f}x" for ratio in (row.speedup, row.promised)),
            MISSING if row.realised_over_promised is None else f"{row.realised_over_promised:.2f}",
            share(row.spread),
            memory_text(row.peak_memory_bytes),
        )
    return table


def _graphs(rows: Sequence[BenchmarkRow]) -> list[str]:
    """Whether kernels were replayed as CUDA graphs, where there are any: in words, for a column leaves no room."""
    if not any(row.device.startswith("cuda") for row in rows):
        return []
    recorded = dict.fromkeys(row.dtype for row in rows if row.graphs)
    if all(row.graphs for row in rows):
        return ["CUDA graphs"]
    return [f"CUDA graphs in {' and '.join(recorded)} alone" if recorded else "no CUDA graphs"]


def _component_times(report: BenchmarkReport) -> list[Table]:
    """Time by component: one table, a column per batch, precision and side."""
    times = report.components or ()
    if not times:
        return []
    headings = [f"{each.side} {each.dtype}\nbatch {each.batch}" for each in times]
    table = _table("milliseconds by component", "component", *headings)
    for name in dict.fromkeys(name for each in times for name in each.ms):
        table.add_row(label(name), *(digits(each.ms[name]) if name in each.ms else MISSING for each in times))
    table.add_section()
    table.add_row("total", *(digits(each.total_ms) for each in times), style="bold")
    return [table]


def _cost_table(title: str, heads: Sequence[str], unit: Unit, sparse: bool) -> Table:
    flops, macs = f"{unit.prefix}FLOPs", f"{unit.prefix}MACs"
    if not sparse:
        return _table(title, *heads, flops, macs)
    sides = (f"{side}\n{measure}" for side in ("dense", "sparse") for measure in (flops, macs))
    return _table(title, *heads, *sides, "change")


def _costs(dense: Cost, sparse: Cost | None, unit: Unit) -> list[str]:
    cells = [unit.show(dense.flops), unit.show(dense.macs)]
    if sparse is not None:
        cells += [unit.show(sparse.flops), unit.show(sparse.macs), change(dense.flops, sparse.flops)]
    return cells


def _summary_table(title: str, rows: Sequence[SummaryRow]) -> Table:
    table = _table(title, "", "dense", "sparse", "change", wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _titled(title: str, plan: str | None) -> str:
    return title if plan is None else f"{title}, plan {plan}"


def _table(title: str, *columns: str, wrap: bool = False) -> Table:
    """A table whose first column is words, which may wrap, and whose others are figures."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left", no_wrap=bool(index) or not wrap)
    return table


def _note(text: str) -> Text:
    return Text(text, style="dim")


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if name.startswith("schema"):
            continue
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{dotted}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, str | Mapping | list) for item in value):
            rest = [f"and {len(value) - MOST_LISTED} more"] if len(value) > MOST_LISTED else []
            yield dotted, "\n".join([*(_plain(item) for item in value[:MOST_LISTED]), *rest])
        elif value is not None and value != [] and value != ():
            yield dotted, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
