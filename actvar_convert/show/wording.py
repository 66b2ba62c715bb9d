"""Figures and names as a person reads them: the same in tables, pages and model cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from actvar_convert.cost.flops import FlopsReport
from actvar_convert.measure.latency import BenchmarkReport, BenchmarkRow
from actvar_convert.measure.quality_report import Paired, QualityReport
from actvar_convert.system.device import largest_memory_bytes, memory_text
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


class SummaryRow(NamedTuple):
    """One measure of both models, in words."""

    measure: str
    dense: str
    sparse: str
    change: str


def summary_rows(
    flops: FlopsReport, quality: QualityReport | None = None, benchmark: BenchmarkReport | None = None
) -> list[SummaryRow]:
    """The few figures that matter, dense beside sparse: FLOPs, FID, KL, seconds per image; only what was measured."""
    rows = _flops_rows(flops)
    if quality is not None:
        if (fid := quality.fid) is not None:
            rows.append(SummaryRow(f"FID, {quality.images} images", *_pair(fid.dense, fid.sparse, ".3f")))
        rows.append(SummaryRow("KL to the dense model, nats per token", MISSING, digits(quality.kl.mean), MISSING))
        same = share(quality.agreement.top1)
        rows.append(SummaryRow("likeliest token as in the dense model", MISSING, same, MISSING))
    for row in summary_latency(benchmark):
        extent = "with decoder" if row.with_decoder else "tokens alone"
        dense, sparse = (None if ms is None else ms / 1000 / row.batch for ms in (row.dense_ms, row.sparse_ms))
        rows.append(
            SummaryRow(
                f"seconds per image {extent}, batch {row.batch} {row.dtype} {row.device}",
                MISSING if dense is None else digits(dense),
                MISSING if sparse is None else digits(sparse),
                change(dense, sparse),
            )
        )
    return rows


def quality_rows(quality: QualityReport) -> list[SummaryRow]:
    """Every measure of quality that has a dense and a sparse value."""
    pairs: list[tuple[str, Paired | None, str]] = [
        ("FID", quality.fid, ".3f"),
        ("inception score", quality.inception_score, ".3f"),
        ("precision", quality.precision, ".3f"),
        ("recall", quality.recall, ".3f"),
        ("label agreement", quality.label_agreement, ".3f"),
    ]
    return [
        SummaryRow(name, *_pair(pair.dense, pair.sparse, places)) for name, pair, places in pairs if pair is not None
    ]


def quality_notes(quality: QualityReport) -> list[str]:
    """What a reader of the quality figures has to know, one sentence each."""
    fid, sampling = quality.fid, quality.sampling
    drawn = f"guidance {sampling.cfg:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}, chunk {sampling.chunk}"
    notes = [f"Held-out pyramids drawn with {drawn}."]
    if fid is not None:
        notes = [
            f"{quality.images} images per model and seed set, seeds {listed(quality.seeds)}; {drawn}; features of "
            f"{quality.extractor}.",
            f"FID changes by {100 * fid.increase:+.2f} % with a standard error of {100 * fid.noise:.2f} percentage "
            "points.",
        ]
    guided = "" if quality.guided_kl is None else f", of guided predictions {quality.guided_kl.mean:.4f},"
    notes.append(
        f"KL to the dense model {quality.kl.mean:.4f} nats per token{guided} on {quality.kl.pyramids} held-out "
        f"pyramids; the likeliest token is the same for {share(quality.agreement.top1)}."
    )
    if fid is not None and fid.tokenizer is not None:
        notes.append(f"FID of the tokenizer's reconstructions: {fid.tokenizer:.3f}.")
    return notes


def summary_latency(benchmark: BenchmarkReport | None) -> list[BenchmarkRow]:
    """The rows that stand for a benchmark: the first precision and the largest batch, with and without the decoder."""
    if benchmark is None or not benchmark.rows:
        return []
    dtype, batch = benchmark.rows[0].dtype, max(row.batch for row in benchmark.rows)
    chosen = [row for row in benchmark.rows if row.dtype == dtype and row.batch == batch]
    return sorted(chosen, key=lambda row: not row.with_decoder)


def flops_note(flops: FlopsReport) -> str:
    """The convention of a FLOPs report in one sentence."""
    convention = flops.convention
    guided = "with classifier-free guidance (two rows, one where it is folded in)"
    guidance = guided if convention.guidance else "without guidance"
    return (
        f"Per image, {guidance}; one multiply-add (MAC) is {convention.flops_per_mac} FLOPs; AdaLN "
        f"{convention.adaln}; not counted: {', '.join(convention.not_counted)}."
    )


def _flops_rows(flops: FlopsReport) -> list[SummaryRow]:
    guidance = "with guidance" if flops.convention.guidance else "without guidance"
    rows = []
    for name, extent in ((f"transformer, {guidance}", "transformer"), ("end to end, with decoder", "end_to_end")):
        dense = getattr(flops.dense, extent)
        if dense is None:
            continue
        sparse = None if flops.sparse is None else getattr(flops.sparse, extent)
        unit = Unit.of(dense.flops)
        rows.append(
            SummaryRow(
                f"{unit.prefix}FLOPs per image, {name}",
                unit.show(dense.flops),
                MISSING if sparse is None else unit.show(sparse.flops),
                MISSING if sparse is None else change(dense.flops, sparse.flops),
            )
        )
    return rows


def _pair(dense: float, sparse: float, places: str) -> tuple[str, str, str]:
    return format(dense, places), format(sparse, places), change(dense, sparse)


def listed(values: Sequence[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, values))


def peak_memory_line() -> str:
    """The largest memory that this process has held, and that of its GPU where it used one."""
    line = f"peak memory {memory_text(largest_memory_bytes())}"
    gpu = largest_memory_bytes(torch.device("cuda")) if torch.cuda.is_available() else 0
    return f"{line}, on the GPU {memory_text(gpu)}" if gpu else line
