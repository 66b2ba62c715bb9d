"""Reports as one self-contained HTML page: no scripts, nothing from the network, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from actvar_convert.cost.flops import Cell, Cost, FlopsReport, ModelCost
from actvar_convert.measure.latency import BenchmarkReport
from actvar_convert.measure.quality_report import QualityReport, RoutingLoad
from actvar_convert.show.charts import Bar, HeatCell, Series, bar_table, heat_map, line_chart, plain_table
from actvar_convert.show.wording import (
    MISSING,
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

NOT_CURVES = {"step", "epoch", "seconds", "time", "elapsed", "learning_rate", "lr", "peak_memory_bytes"}
"""Numbers of a metrics log that are no curves of their own."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2128; --faint: #57606a; --line: #d0d7de;
  --s0: #8b949e; --s1: #0f7b6c; --s2: #a15c00; --heat: #8fd3c7; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6edf3; --faint: #9aa4af; --line: #343b44;
  --s0: #7d8792; --s1: #3cc4ad; --s2: #e3a04a; --heat: #17695d; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p.note, li.note { color: var(--faint); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; }
caption { text-align: left; padding-bottom: .4rem; font-weight: 600; }
th { text-align: left; font-weight: 500; } thead th { color: var(--faint); }
.figures { width: 100%; }
.figures th, .figures td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
.number { text-align: right !important; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bars { width: 100%; min-width: 9rem; } .figures.drawn th { white-space: nowrap; }
.bar { height: .55rem; margin: 2px 0; }
.s0 { --own: var(--s0); } .s1 { --own: var(--s1); } .s2 { --own: var(--s2); }
.bar { background: var(--own); }
.key { font-weight: 400; margin-left: 1rem; }
.key::before { content: ""; display: inline-block; width: .8rem; height: .55rem; margin-right: .35rem;
  background: var(--own); }
.heat td { background: color-mix(in srgb, var(--heat) var(--depth), var(--paper)); border: 1px solid var(--line);
  padding: .2rem .45rem; text-align: right; font-size: .85rem; font-variant-numeric: tabular-nums; }
.heat caption { white-space: nowrap; }
.maps { display: flex; flex-wrap: wrap; gap: 0 3rem; } .maps .scroll { max-width: 100%; }
.heat th { padding: .2rem .6rem; font-size: .85rem; text-align: right; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
svg text.title { fill: var(--ink); font-weight: 600; font-size: 12px; } svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke: var(--own); stroke-width: 1.6; } svg .line.s0 { stroke-dasharray: 4 3; }
svg .line.s0:only-of-type { stroke-dasharray: none; stroke: var(--s1); }
img { max-width: 100%; image-rendering: pixelated; }
"""


def flops_html(report: FlopsReport, title: str = "FLOPs per image") -> str:
    """The FLOPs report as a page: components as bars, blocks by scales as heat maps."""
    return _page(title, _flops_sections(report))


def report_html(
    flops: FlopsReport,
    quality: QualityReport | None = None,
    benchmark: BenchmarkReport | None = None,
    metrics: Iterable[Mapping[str, object]] = (),
    *,
    title: str = "Dense and sparse",
    samples_png: bytes | None = None,
) -> str:
    """Everything about one sparse model on one page; what was not measured is left out.

    Args:
        metrics: lines of a metrics log: ``stage``, ``step`` and the numbers logged.
        samples_png: a picture of samples, put into the page.
    """
    rows = [list(row) for row in summary_rows(flops, quality, benchmark)]
    sections = [plain_table("In short", ["", "dense", "sparse", "change"], rows)]
    if samples_png is not None:
        encoded = base64.b64encode(samples_png).decode()
        picture = f'<img alt="samples of the dense and of the sparse model" src="data:image/png;base64,{encoded}">'
        sections += ["<h2>Samples</h2>", picture]
    if quality is not None:
        sections += _quality_sections(quality)
    if benchmark is not None:
        sections += _benchmark_sections(benchmark)
    sections += _curve_sections(metrics)
    return _page(title, [*sections, "<h2>FLOPs</h2>", *_flops_sections(flops)])


def _page(title: str, sections: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _flops_sections(report: FlopsReport) -> list[str]:
    maps = [_cost_map(report.sparse or report.dense, "sparse" if report.sparse else "dense")]
    if report.sparse is not None:
        maps.insert(0, _remaining_map(report.dense, report.sparse))
    sections = [_components(report), f'<div class="maps">{"".join(maps)}</div>']
    if report.plans:
        unit = Unit.of(report.dense.transformer.flops)
        rows = [
            [name, unit.show(plan.sparse.transformer.flops), share(plan.reduction.transformer)]
            for name, plan in report.plans.items()
        ]
        sections.append(plain_table("Other plans", ["plan", f"transformer {unit.prefix}FLOPs", "saved"], rows))
    return [*sections, _note(flops_note(report))]


def _components(report: FlopsReport) -> str:
    dense, sparse = report.dense, report.sparse
    unit = Unit.of((dense.end_to_end or dense.transformer).flops)

    def bar(name: str, own: Cost, other: Cost | None, drawn: bool = True) -> Bar:
        costs = [own] if other is None else [own, other]
        texts = [unit.show(cost.flops) for cost in costs]
        if other is not None:
            texts.append(change(own.flops, other.flops))
        return Bar(name, [cost.flops if drawn else 0.0 for cost in costs], texts)

    bars = [
        bar(label(name), cost, sparse.components[name] if sparse else None)
        for name, cost in dense.components.items()
        if cost.macs or (sparse and sparse.components[name].macs)
    ]
    bars.append(bar("transformer", dense.transformer, sparse.transformer if sparse else None, drawn=False))
    if dense.end_to_end is not None:
        bars.append(bar("end to end", dense.end_to_end, sparse.end_to_end if sparse else None, drawn=False))
    series = ["dense"] if sparse is None else ["dense", "sparse"]
    columns = series if sparse is None else [*series, "change"]
    plan = f", plan {report.plan}" if report.plan else ""
    return bar_table(f"{unit.prefix}FLOPs per component{plan}", columns, bars, series)


def _hint(block: int, scale: int, cell: Cell, unit: Unit) -> str:
    return (
        f"block {block}, scale {scale}: {unit.show(cell.flops)} {unit.prefix}FLOPs, "
        f"{share(cell.active)} of the neurons, {share(cell.kept)} of the tokens"
    )


def _columns(model: ModelCost) -> list[str]:
    return [f"{scale.side}×{scale.side}" for scale in model.per_scale]  # noqa: RUF001


def _remaining_map(dense: ModelCost, sparse: ModelCost) -> str:
    unit = Unit.of(max(cell.flops for block in dense.per_block for cell in block.scales))
    rows = []
    for own, before in zip(sparse.per_block, dense.per_block, strict=True):
        cells = []
        for scale, (cell, whole) in enumerate(zip(own.scales, before.scales, strict=True)):
            left = cell.macs / whole.macs
            cells.append(HeatCell(left, f"{100 * left:.0f} %", _hint(own.block, scale, cell, unit)))
        rows.append((str(own.block), cells))
    return heat_map("Share of the dense cost that is left", "block, scale", _columns(dense), rows)


def _cost_map(model: ModelCost, side: str) -> str:
    largest = max(cell.flops for block in model.per_block for cell in block.scales) or 1
    unit = Unit.of(largest)
    rows = [
        (
            str(block.block),
            [
                HeatCell(cell.flops / largest, unit.show(cell.flops), _hint(block.block, scale, cell, unit))
                for scale, cell in enumerate(block.scales)
            ],
        )
        for block in model.per_block
    ]
    return heat_map(f"{unit.prefix}FLOPs of the {side} model", "block, scale", _columns(model), rows)


def _quality_sections(report: QualityReport) -> list[str]:
    rows = [list(row) for row in quality_rows(report)]
    scales = [
        Bar(f"scale {scale}", [kl], [f"{kl:.4f}", share(top1)])
        for scale, (kl, top1) in enumerate(zip(report.kl.per_scale, report.agreement.per_scale, strict=True))
    ]
    notes = "".join(f'<li class="note">{escape(note)}</li>' for note in (*quality_notes(report), *report.notes))
    return [
        "<h2>Quality</h2>",
        *([plain_table("Images", ["", "dense", "sparse", "change"], rows)] if rows else []),
        bar_table("Against the dense model", ["KL, nats per token", "same likeliest token"], scales, ["KL"]),
        *_routing_maps(report.routing, len(report.kl.per_scale)),
        f"<ul>{notes}</ul>",
    ]


def _routing_maps(loads: Sequence[RoutingLoad], scales: int) -> list[str]:
    """How evenly routers share tokens out, and how many experts they run, by block and scale; nothing without."""
    if not loads:
        return []
    known = {(each.block, each.scale): each for each in loads}
    blocks, columns = sorted({each.block for each in loads}), [f"scale {scale}" for scale in range(scales)]

    def cells(block: int, show: Callable[[RoutingLoad], tuple[float, str]]) -> list[HeatCell]:
        found = []
        for scale in range(scales):
            each = known.get((block, scale))
            if each is None:
                found.append(HeatCell(0.0, MISSING, f"block {block}, scale {scale}: nothing is routed"))
                continue
            hint = (
                f"block {block}, scale {scale}: {len(each.load)} experts, run by {share(min(each.load))} to "
                f"{share(max(each.load))} of the tokens"
            )
            found.append(HeatCell(*show(each), hint))
        return found

    def drawn(caption: str, show: Callable[[RoutingLoad], tuple[float, str]]) -> str:
        return heat_map(caption, "block", columns, [(str(block), cells(block, show)) for block in blocks])

    balance = drawn("Balance of the routers, 1: all experts alike", lambda each: (each.balance, f"{each.balance:.2f}"))
    active = drawn(
        "Routed experts per token",
        lambda each: (each.active / len(each.load), f"{each.active:.1f} of {len(each.load)}"),
    )
    return [f'<div class="maps">{balance}{active}</div>']


def _benchmark_sections(report: BenchmarkReport) -> list[str]:
    def ratio(value: float | None, suffix: str = "") -> str:
        return MISSING if value is None else f"{value:.2f}{suffix}"

    bars = []
    for row in report.rows:
        times = [ms for ms in (row.dense_ms, row.sparse_ms) if ms is not None]
        name = f"{row.device} {row.dtype}, batch {row.batch}, {'with decoder' if row.with_decoder else 'tokens alone'}"
        texts = [digits(ms / row.batch) for ms in times]
        if row.speedup is not None:
            texts += [ratio(row.speedup, "x"), ratio(row.promised, "x"), ratio(row.realised_over_promised)]
        bars.append(Bar(name, [ms / row.batch for ms in times], [*texts, memory_text(row.peak_memory_bytes)]))
    first = report.rows[0] if report.rows else None
    sides = [side for side in ("dense", "sparse") if first and getattr(first, f"{side}_ms") is not None]
    ratios = ["speed-up", "promised", "realised"] if len(sides) == 2 else []
    columns = [*(f"{side} ms" for side in sides), *ratios, "peak memory"]
    note = (
        f"{report.hardware}, {report.threads} threads, torch {report.torch}; medians of {report.repeats} runs a side."
    )
    return ["<h2>Latency</h2>", bar_table("Milliseconds per image", columns, bars, sides), _note(note)]


def _curve_sections(metrics: Iterable[Mapping[str, object]]) -> list[str]:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in metrics:
        step = line.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in NOT_CURVES:
                curves.setdefault((str(line.get("stage", "")), name), []).append((float(step), float(value)))
    charts = [
        line_chart(f"{stage} {label(name)}".strip(), [Series(name, sorted(points))])
        for (stage, name), points in curves.items()
        if len(points) > 1
    ]
    return ["<h2>Distillation, by step</h2>", f'<div class="curves">{"".join(charts)}</div>'] if charts else []
