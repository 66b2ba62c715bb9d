"""Every report as tables: one value that a terminal, a page, a model card and a CSV file all show.

A new figure is a field of a report and a row here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actvar_convert.cost import flops as costs
from actvar_convert.cost.flops import Cost, FlopsReport, ModelCost
from actvar_convert.measure.cuts import SweepPoint, SweepReport
from actvar_convert.measure.latency import BenchmarkReport, BenchmarkRow
from actvar_convert.measure.quality_report import (
    QUANTILES,
    PairDistances,
    Paired,
    PlanQuality,
    QualityReport,
    RoutingLoad,
)
from actvar_convert.measure.routing import experts_per_token
from actvar_convert.show.figures import (
    MISSING,
    Cell,
    Row,
    Table,
    Unit,
    change,
    columns,
    figure,
    label,
    listed,
    row,
    share,
)
from actvar_convert.system.device import memory_text

MOST_LISTED = 20
"""Entries of a list that an inspection shows before it says how many more there are."""


@dataclass(frozen=True)
class Reports:
    """All that is known about one sparse model; what was not measured is None."""

    flops: FlopsReport
    quality: QualityReport | None = None
    benchmark: BenchmarkReport | None = None


def _fixed(value: float | None, places: int = 4) -> Cell:
    return figure(value, lambda known: f"{known:.{places}f}")


def _changed(before: float | None, after: float | None) -> Cell:
    return Cell(change(before, after))


def _titled(title: str, plan: str | None) -> str:
    return title if plan is None else f"{title}, plan {plan}"


# FLOPs


def flops_tables(report: FlopsReport) -> list[Table]:
    """FLOPs and MACs per component, scale and block, dense beside sparse, and of the other plans."""
    tables = [_component_table(report), _scale_table(report), _block_table(report)]
    return [*tables, _plan_table(report)] if report.plans else tables


def flops_note(flops: FlopsReport) -> str:
    """The convention of a FLOPs report in one sentence."""
    convention = flops.convention
    guided = "with classifier-free guidance (two rows, one if it is folded in)"
    guidance = guided if convention.guidance else "without guidance"
    return (
        f"Per image, {guidance}; one multiply-add (MAC) is {convention.flops_per_mac} FLOPs; AdaLN "
        f"{convention.adaln}; not counted: {', '.join(convention.not_counted)}."
    )


def _component_table(report: FlopsReport) -> Table:
    sides = [side for side in (report.dense, report.sparse) if side is not None]
    unit = Unit.of((report.dense.end_to_end or report.dense.transformer).flops)
    largest = max(cost.flops for side in sides for cost in side.components.values())

    def line(name: str, costs: Sequence[Cost], total: bool = False) -> Row:
        cells = []
        for cost in costs:
            bar = None if total else cost.flops / largest
            cells += [figure(cost.flops, unit.show, bar), figure(cost.macs, unit.show)]
        return row(name, *cells, *_change_of(costs), total=total)

    def component(name: str) -> Row:
        return line(label(name), [side.components[name] for side in sides])

    names = [name for name in report.dense.components if any(side.components[name].macs for side in sides)]
    rows = [component(name) for name in names if name != "vqvae_decoder"]
    rows.append(line("transformer", [side.transformer for side in sides], total=True))
    whole = [side.end_to_end for side in sides if side.end_to_end is not None]
    if whole:
        rows += [component("vqvae_decoder"), line("end to end", whole, total=True)]
    flops, macs = f"{unit.prefix}FLOPs", f"{unit.prefix}MACs"
    heads = [flops, macs]
    if len(sides) == 2:
        heads = [*(f"{side}\n{measure}" for side in ("dense", "sparse") for measure in (flops, macs)), "change"]
    title = _titled("per component", report.plan)
    return Table(title, columns("component", *heads), tuple(rows), (flops_note(report),))


def _change_of(sides: Sequence[Cost]) -> list[Cell]:
    """From the first side to the second; nothing if there is one."""
    return [_changed(*(side.flops for side in sides))] if len(sides) == 2 else []


def _scale_table(report: FlopsReport) -> Table:
    dense, sparse = report.dense.per_scale, report.sparse
    unit = Unit.of(max(scale.flops for scale in dense))
    rows = []
    for index, scale in enumerate(dense):
        sides = [scale] if sparse is None else [scale, sparse.per_scale[index]]
        cells = [] if sparse is None else [block.scales[index] for block in sparse.per_block]
        name = str(scale.scale), f"{scale.side}x{scale.columns or scale.side}", figure(scale.tokens, str)
        rows.append(row(*name, *_work(sides, cells, unit)))
    return Table("per scale", columns("scale", "map", "tokens", *_work_heads(unit, sparse)), tuple(rows))


def _block_table(report: FlopsReport) -> Table:
    dense, sparse = report.dense.per_block, report.sparse
    unit = Unit.of(max(block.flops for block in dense))
    rows = []
    for index, block in enumerate(dense):
        sides = [block] if sparse is None else [block, sparse.per_block[index]]
        cells = () if sparse is None else sparse.per_block[index].scales
        rows.append(row(str(block.block), *_work(sides, cells, unit)))
    return Table("per block", columns("block", *_work_heads(unit, sparse)), tuple(rows))


def _work_heads(unit: Unit, sparse: ModelCost | None) -> list[str]:
    flops = f"{unit.prefix}FLOPs"
    return [flops] if sparse is None else [f"dense\n{flops}", f"sparse\n{flops}", "change", *_LEAST]


_LEAST = "least\nneurons", "least\ntokens"


def _work(sides: Sequence[Cost], cells: Sequence[costs.Cell], unit: Unit) -> list[Cell]:
    """FLOPs of the sides, their change, and the smallest shares of active neurons and kept tokens among the cells."""
    least = [min(cell.active for cell in cells), min(cell.kept for cell in cells)] if cells else []
    work = [figure(side.flops, unit.show) for side in sides]
    return [*work, *_change_of(sides), *(figure(value, share) for value in least)]


def _plan_table(report: FlopsReport) -> Table:
    unit = Unit.of(report.dense.transformer.flops)
    rows = [
        row(
            name,
            figure(plan.sparse.transformer.flops, unit.show),
            figure(plan.reduction.transformer, share),
            figure(plan.reduction.end_to_end, share),
        )
        for name, plan in (report.plans or {}).items()
    ]
    heads = "plan", f"transformer {unit.prefix}FLOPs", "saved", "saved end to end"
    return Table("other plans", columns(*heads), tuple(rows))


def flops_maps(report: FlopsReport) -> list[Table]:
    """Blocks by scales: what is left of the dense cost, and the cost of the model itself."""
    dense, model = report.dense, report.sparse or report.dense
    side = "dense" if report.sparse is None else "sparse"
    largest = max(cell.flops for block in model.per_block for cell in block.scales) or 1
    unit, whole = Unit.of(largest), Unit.of(max(cell.flops for block in dense.per_block for cell in block.scales))

    def cost(block: int, scale: int) -> Cell:
        cell = model.per_block[block].scales[scale]
        return Cell(unit.show(cell.flops), cell.flops, cell.flops / largest, _hint(block, scale, cell, unit))

    def left(block: int, scale: int) -> Cell:
        cell = model.per_block[block].scales[scale]
        part = cell.macs / dense.per_block[block].scales[scale].macs
        return Cell(f"{100 * part:.0f} %", part, part, _hint(block, scale, cell, whole))

    blocks = range(len(dense.per_block))
    heads = [f"{scale.side}×{scale.side}" for scale in dense.per_scale]  # noqa: RUF001
    maps = [_map(f"{unit.prefix}FLOPs of the {side} model", blocks, heads, cost)]
    if report.sparse is not None:
        maps.insert(0, _map("Share of the dense cost that is left", blocks, heads, left))
    return maps


def _hint(block: int, scale: int, cell: costs.Cell, unit: Unit) -> str:
    return (
        f"block {block}, scale {scale}: {unit.show(cell.flops)} {unit.prefix}FLOPs, "
        f"{share(cell.active)} of the neurons, {share(cell.kept)} of the tokens"
    )


def _map(title: str, blocks: Sequence[int], scales: Sequence[str], cell: Callable[[int, int], Cell]) -> Table:
    """A map of blocks by scales; ``cell`` is called with both."""
    rows = tuple(row(str(block), *(cell(block, scale) for scale in range(len(scales)))) for block in blocks)
    return Table(title, columns("block, scale", *scales), rows, map=True)


def flops_figures(report: FlopsReport) -> Table:
    """Every figure of a FLOPs report, one a line, for a CSV file.

    Columns: plan (empty for the dense model), part (total, component, scale, block or cell), block, scale, component,
    flops, macs.
    """
    names = "plan", "part", "block", "scale", "component"
    rows = [
        row(*map(str, (plan, *place)), figure(cost.flops, str), figure(cost.macs, str))
        for plan, model in _models(report)
        for *place, cost in _lines(model)
    ]
    return Table("FLOPs", columns(*names, "flops", "macs", words=len(names)), tuple(rows))


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


# Quality


def quality_tables(report: QualityReport) -> list[Table]:
    """Quality of dense and sparse, how far apart their pictures and predictions are, what was routed, other plans."""
    tables = [_image_table(report)] if report.fid is not None else []
    if report.distances is not None:
        tables.append(_distance_table(report.distances))
    tables.append(_agreement_table(report))
    if report.routing:
        tables.append(_routing_table(report.routing))
    if report.plans:
        tables.append(_plan_quality_table(report.plans))
    return tables


def quality_notes(quality: QualityReport) -> list[str]:
    """What a reader of the quality figures has to know, one sentence each."""
    fid, sampling = quality.fid, quality.sampling
    cfg = listed(sampling.cfg) if isinstance(sampling.cfg, tuple) else f"{sampling.cfg:g}"
    tau = listed(sampling.tau) if isinstance(sampling.tau, tuple) else f"{sampling.tau or 1:g}"
    sampled = f"guidance {cfg}, top-k {sampling.top_k}, top-p {sampling.top_p:g}, chunk {sampling.chunk}"
    sampled = sampled if sampling.tau is None else f"temperature {tau}, {sampled}"
    notes = [f"Held-out pyramids sampled with {sampled}."]
    if fid is not None:
        notes = [
            f"{quality.images} images per model and seed set, seeds {listed(quality.seeds)}; {sampled}; features of "
            f"{quality.extractor}.",
            f"FID changes by {100 * fid.increase:+.2f} % with a standard error of {100 * fid.noise:.2f} percentage "
            "points.",
        ]
    guided = "" if quality.guided_kl is None else f", of guided predictions {quality.guided_kl.mean:.4f},"
    notes.append(
        f"KL to the dense model {quality.kl.mean:.4f} nats per token{guided} on {quality.kl.pyramids} held-out "
        f"pyramids; the likeliest token is the same for {share(quality.agreement.top1)}."
    )
    if quality.distances is not None:
        notes += _distance_notes(quality.distances)
    if fid is not None and fid.tokenizer is not None:
        notes.append(f"FID of the tokenizer's reconstructions: {fid.tokenizer:.3f}.")
    return [*notes, *quality.notes]


def _image_rows(quality: QualityReport) -> list[Row]:
    """Every measure of images, dense and sparse."""
    pairs: list[tuple[str, Paired | None]] = [
        ("FID", quality.fid),
        ("inception score", quality.inception_score),
        ("precision", quality.precision),
        ("recall", quality.recall),
        ("label agreement", quality.label_agreement),
    ]
    return [row(name, *_pair(pair)) for name, pair in pairs if pair is not None]


def _pair(pair: Paired | None) -> list[Cell]:
    if pair is None:
        return [Cell(MISSING)] * 3
    return [_fixed(pair.dense, 3), _fixed(pair.sparse, 3), _changed(pair.dense, pair.sparse)]


def _image_table(report: QualityReport) -> Table:
    return Table(_titled("quality", report.plan), columns("", "dense", "sparse", "change"), tuple(_image_rows(report)))


def _distance_table(distances: PairDistances) -> Table:
    """How far pictures lie from those of the dense model, in pixels and in features."""
    kinds = ("pixels (RMSE)", distances.pixel), ("features (1 - cosine)", distances.feature)
    rows = [
        row(name, *(_fixed(value) for value in (each.mean, each.standard_error, *each.quantiles)))
        for name, each in kinds
        if each is not None
    ]
    heads = "", "mean", "error", *(f"{100 * part:.0f} %" for part in QUANTILES)
    return Table("distance to the dense model's picture of the same seed", columns(*heads), tuple(rows))


def _distance_notes(distances: PairDistances) -> list[str]:
    """What was compared, and the pairs to look at."""
    psnr = "" if distances.psnr is None else f", a PSNR of {distances.psnr:.1f} dB"
    notes = [
        f"{distances.pairs} pictures lie {distances.pixel.mean:.4f} from the dense model's of the same seed{psnr}: "
        f"root mean squared error of pixels in 0 to 1, standard error {distances.pixel.standard_error:.4f}."
    ]
    if distances.psnr is not None:
        farthest = [
            f"{each.index} ({'' if each.label is None else f'label {each.label}, '}{each.pixel:.3f})"
            for each in distances.worst
        ]
        notes.append(f"Farthest apart of seed {distances.worst[0].seed}: {', '.join(farthest)}.")
    return notes


def _agreement_table(report: QualityReport) -> Table:
    kl, top1 = report.kl, report.agreement
    largest = max(kl.per_scale, default=0.0) or 1.0
    rows = [
        row(str(scale), replace(_fixed(divergence), bar=divergence / largest), figure(same, share))
        for scale, (divergence, same) in enumerate(zip(kl.per_scale, top1.per_scale, strict=True))
    ]
    rows.append(row("mean", _fixed(kl.mean), figure(top1.top1, share), total=True))
    heads = "scale", "KL (nats per token)", "top-1 agreement"
    notes = tuple(quality_notes(report))
    return Table("against the dense model, per scale", columns(*heads), tuple(rows), notes)


def _routing_table(loads: Sequence[RoutingLoad]) -> Table:
    """What the routers of each block chose, over the scales that it routes."""
    rows = []
    for block in sorted({each.block for each in loads}):
        own = [each for each in loads if each.block == block]
        loaded = [load for each in own for load in each.load]
        figures = experts_per_token(own), min(each.balance for each in own)
        rows.append(
            row(
                str(block),
                listed([each.scale for each in own]),
                *(_fixed(value, 2) for value in figures),
                figure(min(loaded), share),
                figure(max(loaded), share),
            )
        )
    heads = "block", "scales", "experts\nper token", "least\nbalance", "least\nload", "most\nload"
    return Table("routed experts", columns(*heads), tuple(rows))


def _plan_quality_table(plans: Mapping[str, PlanQuality]) -> Table:
    rows = [
        row(name, *_pair(each.fid), _fixed(each.kl.mean), figure(each.agreement.top1, share))
        for name, each in plans.items()
    ]
    heads = "plan", "FID dense", "FID sparse", "change", "KL", "top-1 agreement"
    return Table("other plans", columns(*heads), tuple(rows))


def routing_maps(report: QualityReport) -> list[Table]:
    """How evenly routers share tokens out, and how many experts they run, by block and scale; none without routers."""
    known = {(each.block, each.scale): each for each in report.routing}
    blocks = sorted({block for block, _ in known})
    scales = [f"scale {scale}" for scale in range(len(report.kl.per_scale))]

    def map_of(title: str, value: Callable[[RoutingLoad], float], text: Callable[[RoutingLoad], str]) -> Table:
        def cell(block: int, scale: int) -> Cell:
            place, each = f"block {block}, scale {scale}", known.get((block, scale))
            if each is None:
                return Cell(MISSING, bar=0.0, hint=f"{place}: nothing is routed")
            least, most = share(min(each.load)), share(max(each.load))
            hint = f"{place}: {len(each.load)} experts, run by {least} to {most} of the tokens"
            return Cell(text(each), value(each), value(each), hint)

        return _map(title, blocks, scales, cell)

    if not known:
        return []
    return [
        map_of("Balance of the routers, 1: all experts alike", lambda e: e.balance, lambda e: f"{e.balance:.2f}"),
        map_of(
            "Routed experts per token",
            lambda each: each.active / len(each.load),
            lambda each: f"{each.active} of {len(each.load)}",
        ),
    ]


# Latency


def benchmark_tables(report: BenchmarkReport) -> list[Table]:
    """Latency per batch size and dtype, the speed-up, how much of the promised one it is, and time by component."""
    extents = sorted({row.with_decoder for row in report.rows})
    tables = [_latency_table(report, extent) for extent in extents]
    if tables:
        tables[-1] = replace(tables[-1], notes=(benchmark_note(report),))
    return [*tables, _time_table(report)] if report.components else tables


def benchmark_note(report: BenchmarkReport) -> str:
    """Where and how times were taken, and what the ratios mean."""
    return (
        f"{report.hardware}, {report.threads} threads, torch {report.torch}. Medians of {report.repeats} runs per "
        "side, alternating; images per second: of the measured model; spread: interquartile range over median. "
        "Promised: dense FLOPs over sparse FLOPs; realised: speed-up over promised."
    )


def _latency_table(report: BenchmarkReport, with_decoder: bool) -> Table:
    measured = [each for each in report.rows if each.with_decoder == with_decoder]
    decoders = ", ".join(dict.fromkeys(each.decoder_dtype for each in measured))
    what = f"latency with decoder in {decoders}" if with_decoder else "latency of tokens alone"
    title = _titled(
        ", ".join((what, *dict.fromkeys(each.device for each in measured), *_graphs(measured))), report.plan
    )
    times = [ms / each.batch for each in measured for ms in (each.dense_ms, each.sparse_ms) if ms is not None]
    rows = []
    for each in measured:
        own = each.dense_images_per_second if each.sparse_ms is None else each.sparse_images_per_second
        rows.append(
            row(
                each.dtype,
                figure(each.batch, str),
                *(
                    figure(ms, bar=None if ms is None else ms / each.batch / max(times))
                    for ms in (each.dense_ms, each.sparse_ms)
                ),
                figure(own),
                *(figure(ratio, lambda known: f"{known:.2f}x") for ratio in (each.speedup, each.promised)),
                _fixed(each.realised_over_promised, 2),
                figure(each.spread, share),
                figure(each.peak_memory_bytes, memory_text),
            )
        )
    ratios = "speed\nup", "prom-\nised", "real-\nised"
    heads = "dtype", "batch", "dense\nms", "sparse\nms", "images\n/s", *ratios, "spread", "peak\nmemory"
    return Table(title, columns(*heads), tuple(rows), bars="milliseconds per image")


def _graphs(rows: Sequence[BenchmarkRow]) -> list[str]:
    """Whether kernels were replayed as CUDA graphs, if there are any: in words, for a column leaves no room."""
    if not any(row.device.startswith("cuda") for row in rows):
        return []
    recorded = dict.fromkeys(row.dtype for row in rows if row.graphs)
    if all(row.graphs for row in rows):
        return ["CUDA graphs"]
    return [f"CUDA graphs in {' and '.join(recorded)} alone" if recorded else "no CUDA graphs"]


def _time_table(report: BenchmarkReport) -> Table:
    """Time by component: a column per batch, dtype and side."""
    times = report.components or ()
    heads = [f"{each.side} {each.dtype}\nbatch {each.batch}" for each in times]
    names = dict.fromkeys(name for each in times for name in each.ms)
    rows = [row(label(name), *(figure(each.ms.get(name)) for each in times)) for name in names]
    rows.append(row("total", *(figure(each.total_ms) for each in times), total=True))
    return Table("milliseconds by component", columns("component", *heads), tuple(rows))


# All reports of one model


def summary_table(reports: Reports) -> Table:
    """The few figures that matter, dense beside sparse: FLOPs, FID, KL, seconds per image; only what was measured."""
    flops, quality = reports.flops, reports.quality
    rows = _flops_rows(flops)
    if quality is not None:
        if quality.fid is not None:
            rows.append(row(f"FID, {quality.images} images", *_pair(quality.fid)))
        none = Cell(MISSING)
        rows.append(row("KL to the dense model, nats per token", none, figure(quality.kl.mean), none))
        rows.append(row("likeliest token as in the dense model", none, figure(quality.agreement.top1, share), none))
        if quality.distances is not None:
            distance = figure(quality.distances.pixel.mean)
            rows.append(row("pixel distance to the dense model's picture", none, distance, none))
    for each in _summary_latency(reports.benchmark):
        extent = "with decoder" if each.with_decoder else "tokens alone"
        dense, sparse = (None if ms is None else ms / 1000 / each.batch for ms in (each.dense_ms, each.sparse_ms))
        name = f"seconds per image {extent}, batch {each.batch} {each.dtype} {each.device}"
        rows.append(row(name, figure(dense), figure(sparse), _changed(dense, sparse)))
    title = _titled("dense and sparse", flops.plan)
    return Table(title, columns("", "dense", "sparse", "change"), tuple(rows))


def card_table(reports: Reports) -> Table:
    """The summary with every measure of images, and all that a reader has to know."""
    table, quality, benchmark = summary_table(reports), reports.quality, reports.benchmark
    rows, notes = table.rows, [flops_note(reports.flops)]
    if quality is not None:
        rows += tuple(each for each in _image_rows(quality) if each.cells[0].text != "FID")
        notes += quality_notes(quality)
    if benchmark is not None:
        notes.append(f"Times on {benchmark.hardware}, {benchmark.threads} threads, torch {benchmark.torch}.")
    return replace(table, rows=rows, notes=tuple(notes))


def _flops_rows(flops: FlopsReport) -> list[Row]:
    dense, sparse = flops.dense, flops.sparse
    guidance = "with guidance" if flops.convention.guidance else "without guidance"
    rows = [_flops_row(f"transformer, {guidance}", dense.transformer, None if sparse is None else sparse.transformer)]
    if dense.end_to_end is not None:
        rows.append(
            _flops_row("end to end, with decoder", dense.end_to_end, None if sparse is None else sparse.end_to_end)
        )
    return rows


def _flops_row(name: str, dense: Cost, sparse: Cost | None) -> Row:
    unit, after = Unit.of(dense.flops), None if sparse is None else sparse.flops
    figures = figure(dense.flops, unit.show), figure(after, unit.show), _changed(dense.flops, after)
    return row(f"{unit.prefix}FLOPs per image, {name}", *figures)


def _summary_latency(benchmark: BenchmarkReport | None) -> list[BenchmarkRow]:
    """The rows that stand for a benchmark: the first dtype and the largest batch, with and without the decoder."""
    if benchmark is None or not benchmark.rows:
        return []
    dtype, batch = benchmark.rows[0].dtype, max(row.batch for row in benchmark.rows)
    chosen = [row for row in benchmark.rows if row.dtype == dtype and row.batch == batch]
    return sorted(chosen, key=lambda row: not row.with_decoder)


# Sweeps


def sweep_table(report: SweepReport) -> Table:
    """Cost and quality of every cut; the largest one within the limit is marked."""
    unit = Unit.of(report.dense_flops)
    heads = ["asked for", "saved", f"{unit.prefix}FLOPs", "KL, nats\nper token", "error", "top-1\nagreement", "error"]
    with_fid = any(point.fid for point in report.points)
    if with_fid:
        heads += ["FID\ndense", "FID\nsparse", "change\n%", "error"]
    rows, notes = [], []
    for point in report.points:
        name = share(point.target) + (" *" if point.target == report.chosen else "")
        if point.kl is None or point.agreement is None or point.flops is None:
            rows.append(row(name, "out of reach", *[""] * (len(heads) - 2)))
            notes.append(f"{share(point.target)}: {point.problem}")
            continue
        measured = (
            figure(point.reduction, share),
            figure(point.flops, unit.show),
            *(_fixed(value) for value in (point.kl.mean, point.kl.standard_error)),
            *(figure(value, share) for value in (point.agreement.top1, point.agreement.standard_error)),
        )
        rows.append(row(name, *measured, *(_fid_cells(point) if with_fid else ())))
    if report.max_kl is not None:
        found = "none of these" if report.chosen is None else f"* {share(report.at(report.chosen).reduction)} saved"
        setting = "" if report.chosen is None else f" (--set budget.reduction={report.chosen:g})"
        notes.append(f"Largest cut with a KL of at most {report.max_kl:g}: {found}{setting}.")
    notes.append(
        f"Dense: {unit.show(report.dense_flops)} {unit.prefix}FLOPs per image, transformer with guidance. KL and "
        f"agreement to the dense model on {report.held_out} held-out pyramids, with standard errors; recipe "
        f"{report.recipe}, {report.calibration_pyramids} calibration pyramids, nothing distilled."
    )
    title = f"quality against cost without training, {report.model}"
    return Table(title, columns(*heads), tuple(rows), tuple(notes))


def _fid_cells(point: SweepPoint) -> list[Cell]:
    if point.fid is None:
        return [Cell("")] * 4
    fid = point.fid
    return [
        _fixed(fid.dense, 3),
        _fixed(fid.sparse, 3),
        figure(fid.increase, lambda known: f"{100 * known:+.1f}"),
        figure(fid.jackknife_error, lambda known: f"{100 * known:.1f}"),
    ]


SWEEP_COLUMNS = (
    *("target", "reduction", "reduction_end_to_end", "flops", "macs", "kl", "kl_error", "expected_kl"),
    *("top1", "top1_error"),
    *("fid_images", "fid_dense", "fid_sparse", "fid_increase", "fid_error", "problem"),
)
"""``_error``: standard errors."""


def sweep_figures(report: SweepReport) -> Table:
    """Every figure of a sweep, one line per point, for a CSV file; what was not measured is empty."""

    def line(point: SweepPoint) -> Row:
        kl, agreement, fid = point.kl, point.agreement, point.fid
        figures = [
            *(point.target, point.reduction, point.reduction_end_to_end, point.flops, point.macs),
            *((kl.mean, kl.standard_error, point.expected_kl) if kl else (None,) * 3),
            *((agreement.top1, agreement.standard_error) if agreement else (None, None)),
            *((fid.images, fid.dense, fid.sparse, fid.increase, fid.jackknife_error) if fid else (None,) * 5),
        ]
        cells = (Cell("") if each is None else figure(each, str) for each in figures)
        return row(*cells, point.problem or "")

    return Table("sweep", columns(*SWEEP_COLUMNS), tuple(map(line, report.points)))


# Files


def inspection_table(inspection: Any) -> Table:
    """What is in a file: every field of an inspection, long lists shortened.

    Args:
        inspection: a mapping, or a pydantic model.
    """
    values = inspection if isinstance(inspection, Mapping) else json.loads(inspection.model_dump_json())
    return Table("", columns("", "", words=2), tuple(row(label(name), text) for name, text in _flattened(values)))


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
