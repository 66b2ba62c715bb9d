"""Reports as one self-contained HTML page: no scripts, nothing from the network, light and dark.

Text and numbers stay readable without colour: every bar and every cell of a map carries its figure.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from actvar_convert.cost.flops import FlopsReport
from actvar_convert.show.charts import Series, line_chart
from actvar_convert.show.figures import Row, Table, label
from actvar_convert.show.tables import (
    Reports,
    benchmark_tables,
    flops_maps,
    flops_tables,
    quality_tables,
    routing_maps,
    summary_table,
)

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
p.note, span.bars { color: var(--faint); } span.bars { font-weight: 400; margin-left: 1rem; }
tr.total > * { font-weight: 600; }
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
    """The FLOPs report as a page: components as bars, blocks by scales as maps."""
    return _page(title, _flops_sections(report))


def report_html(
    reports: Reports,
    metrics: Iterable[Mapping[str, object]] = (),
    *,
    title: str = "Dense and sparse",
    samples_png: bytes | None = None,
) -> str:
    """Everything about one sparse model on one page; what was not measured is left out.

    Args:
        reports: what is known about it.
        metrics: lines of a metrics log: ``stage``, ``step`` and the numbers logged.
        title: of the page.
        samples_png: a picture of samples, put into the page.
    """
    sections = [table_html(summary_table(reports))]
    if samples_png is not None:
        encoded = base64.b64encode(samples_png).decode()
        picture = f'<img alt="samples of the dense and of the sparse model" src="data:image/png;base64,{encoded}">'
        sections += ["<h2>Samples</h2>", picture]
    if reports.quality is not None:
        sections += ["<h2>Quality</h2>", *map(table_html, quality_tables(reports.quality))]
        sections.append(_maps(routing_maps(reports.quality)))
    if reports.benchmark is not None:
        sections += ["<h2>Latency</h2>", *map(table_html, benchmark_tables(reports.benchmark))]
    sections += _curve_sections(metrics)
    return _page(title, [*sections, "<h2>FLOPs</h2>", *_flops_sections(reports.flops)])


def _flops_sections(report: FlopsReport) -> list[str]:
    components, *others = map(table_html, flops_tables(report))
    return [components, _maps(flops_maps(report)), *others]


def _maps(tables: Sequence[Table]) -> str:
    return f'<div class="maps">{"".join(map(table_html, tables))}</div>' if tables else ""


def table_html(table: Table) -> str:
    """A table with its notes; bars stand in a column of their own, a map has coloured cells."""
    drawn = () if table.map else table.drawn
    keys = "".join(
        f'<span class="key s{i}">{escape(table.columns[column].name.split(chr(10))[0])}</span>'
        for i, column in enumerate(drawn)
    )
    meaning = f' <span class="bars">{escape(table.bars)}</span>' if drawn and table.bars else ""
    heads = []
    for index, column in enumerate(table.columns):
        kind = "" if column.words else ' class="number"'
        heads.append(f'<th scope="col"{kind}>{escape(column.name)}</th>')
        if index == 0 and drawn:
            heads.append('<td aria-hidden="true"></td>')
    lines = "".join(_line(table, row, drawn) for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    kind = "heat" if table.map else "figures drawn" if drawn else "figures"
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{escape(table.title)}{keys}{meaning}</caption>'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{lines}</tbody></table></div>{notes}"
    )


def _line(table: Table, row: Row, drawn: Sequence[int]) -> str:
    first, *rest = row.cells
    cells = [f'<th scope="row">{escape(first.text)}</th>']
    if drawn:
        bars = ((i, row.cells[column].bar) for i, column in enumerate(drawn))
        cells.append(f'<td class="bars" aria-hidden="true">{"".join(_bar(i, bar) for i, bar in bars if bar)}</td>')
    for column, cell in zip(table.columns[1:], rest, strict=True):
        kind = "" if column.words or table.map else ' class="number"'
        depth = f' style="--depth:{100 * min(max(cell.bar or 0.0, 0.0), 1.0):.1f}%"' if table.map else ""
        hint = f' title="{escape(cell.hint)}"' if cell.hint else ""
        cells.append(f"<td{kind}{depth}{hint}>{escape(cell.text)}</td>")
    kind = ' class="total"' if row.total else ""
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _bar(series: int, length: float) -> str:
    return f'<div class="bar s{series}" style="width:{max(100 * length, 0.4):.2f}%"></div>'


def _page(title: str, sections: Sequence[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


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
