"""Latency of generation, dense against sparse, on this machine: the clock beside the FLOPs.

The two sides alternate (A B A B), so that a machine that warms up or is busy elsewhere hits both alike; medians are
reported with their spread. The JSON contract is ``actvar.benchmark/1``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from actvar_convert.cost.flops import count_flops
from actvar_convert.errors import InputError
from actvar_convert.measure.components import ComponentTimes, split_components
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model
from actvar_convert.models.sampling import whole_number, whole_numbers
from actvar_convert.system.device import (
    DTYPES,
    DtypeLike,
    peak_memory_bytes,
    pick_dtype,
    reset_peak_memory,
    synchronize,
)
from actvar_convert.system.dtype_names import short_dtype
from actvar_convert.system.progress import Progress, SilentProgress, Task


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchmarkRow(_Value):
    """One batch size, dtype and extent; the ratios need both sides."""

    device: str
    dtype: str
    batch: int = Field(description="images generated at once")
    with_decoder: bool = Field(description="images; otherwise tokens alone")
    decoder_dtype: str = Field(default="fp32", description="of the tokenizer's decoder")
    graphs: bool = Field(default=False, description="replayed as CUDA graphs; otherwise started kernel by kernel")
    dense_ms: float | None = Field(default=None, description="median milliseconds of a batch")
    sparse_ms: float | None = None
    speedup: float | None = Field(default=None, description="dense_ms / sparse_ms")
    promised: float | None = Field(default=None, description="dense FLOPs / sparse FLOPs, of the same extent")
    realised_over_promised: float | None = None
    dense_images_per_second: float | None = None
    sparse_images_per_second: float | None = None
    spread: float = Field(description="interquartile range over median of the repeats; the larger of the two sides")
    peak_memory_bytes: int = Field(description="of the measured model's runs: device memory, on a CPU of the process")


class BenchmarkReport(_Value):
    """Latency of one model, alone or against another."""

    format: Literal["actvar.benchmark/1"] = Field(default="actvar.benchmark/1", alias="schema")
    plan: str | None = Field(description="of the sparse side")
    hardware: str
    threads: int = Field(description="CPU threads of one operation")
    torch: str
    repeats: int = Field(description="timed runs of each side, after one to warm up")
    rows: tuple[BenchmarkRow, ...]
    components: tuple[ComponentTimes, ...] | None = Field(default=None, description="time by component, with decoder")

    def to_json(self) -> str:
        """The report as one JSON object, schema ``actvar.benchmark/1``; a figure that was not measured is null."""
        return self.model_dump_json(by_alias=True, indent=2)


class _Call(NamedTuple):
    """One call of ``generate``, or of ``generate_tokens`` without the decoder."""

    batch: int
    with_decoder: bool
    graphs: bool

    def seconds(self, model: Model) -> float:
        condition = model.family.balanced(model.config, self.batch)
        run = model.generate if self.with_decoder else model.generate_tokens
        synchronize(model.device)
        began = time.perf_counter()
        run(condition, seed=0, chunk=self.batch, compile=self.graphs)
        synchronize(model.device)
        return time.perf_counter() - began


class _Times(NamedTuple):
    seconds: list[float]
    peak_memory: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(frozen=True)
class Timing:
    """What is timed, and how.

    Attributes:
        batches: images at once.
        dtypes: fp32, bf16 or fp16 (or torch's own), of the transformer.
        decoder_dtype: of both sides' decoders; None: what the model has, which after ``load`` is fp32.
        repeats: timed runs per side and row, after one to warm up.
        with_decoder: False for tokens, True for images; one row each.
        split: also the time by component, per batch size, dtype and side.
        compile: replay CUDA graphs on both sides, see ``Model.generate``; None: if both can.
    """

    batches: Sequence[int] = (1, 4, 16)
    dtypes: Sequence[DtypeLike] = ("fp32",)
    decoder_dtype: DtypeLike | None = None
    repeats: int = 5
    with_decoder: Sequence[bool] = (False, True)
    split: bool = False
    compile: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "repeats", whole_number("repeats", self.repeats))
        object.__setattr__(self, "batches", tuple(whole_numbers("batches", self.batches)))

    @property
    def names(self) -> list[str]:
        """The dtypes by their short names."""
        return [str(short_dtype(dtype)) for dtype in self.dtypes]


def benchmark_models(
    model: Model, against: Model | None, timing: Timing, *, progress: Progress | None = None
) -> BenchmarkReport:
    """Times generation with guidance.

    Args:
        model: the model in question, on the device to measure. Another dtype than its own is measured on a copy.
        against: the dense model it is compared with; None measures ``model`` alone.
        timing: what is timed.
        progress: told about every run.

    Raises:
        InputError: settings or models that cannot be measured, all problems at once.
    """
    _check(model, against, timing)
    given = timing.decoder_dtype
    decoder = model.tokenizer.decoder_dtype if given is None else pick_dtype(given, model.device)
    runs = len(timing.batches) * len(timing.dtypes) * len(timing.with_decoder) * (timing.repeats + 1)
    rows: list[BenchmarkRow] = []
    components: list[ComponentTimes] = []
    with (progress or SilentProgress()).task("benchmark", runs * (1 if against is None else 2)) as task:
        for dtype in timing.names:
            sides = [cast(side, DTYPES[dtype], decoder=decoder) for side in (model, against) if side is not None]
            graphs = _all_record(sides) if timing.compile is None else timing.compile
            for batch in timing.batches:
                for with_decoder in timing.with_decoder:
                    call = _Call(batch, with_decoder, graphs)
                    rows.append(_row(sides, dtype, call, _alternate(sides, call, timing.repeats, task)))
                if timing.split:
                    components += [split_components(side, batch) for side in sides]
    return BenchmarkReport(
        plan=None if model.plans is None else model.plans.name,
        hardware=hardware_name(model.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        repeats=timing.repeats,
        rows=tuple(rows),
        components=tuple(components) or None,
    )


def hardware_name(device: torch.device) -> str:
    """The processor in words, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else device.type


def _all_record(sides: Sequence[Model]) -> bool:
    """Whether generation of all sides can be recorded as CUDA graphs; tried with one image."""
    try:
        for side in sides:
            side.generate_tokens([0], compile=True)
    except InputError:
        return False
    return True


def _row(sides: Sequence[Model], dtype: str, call: _Call, timings: Sequence[_Times]) -> BenchmarkRow:
    own = sides[0]
    sparse: _Times | None = None
    dense: _Times | None = None
    speedup: float | None = None
    promised: float | None = None
    if len(sides) == 2:
        sparse, dense = timings
        speedup = dense.median / sparse.median
        promised = _macs(sides[1], call.with_decoder) / _macs(own, call.with_decoder)
    elif own.is_sparse:
        sparse = timings[0]
    else:
        dense = timings[0]
    return BenchmarkRow(
        device=str(own.device),
        dtype=dtype,
        batch=call.batch,
        with_decoder=call.with_decoder,
        decoder_dtype=next(name for name, known in DTYPES.items() if known == own.tokenizer.decoder_dtype),
        graphs=call.graphs,
        dense_ms=1000 * dense.median if dense else None,
        sparse_ms=1000 * sparse.median if sparse else None,
        speedup=speedup,
        promised=promised,
        realised_over_promised=speedup / promised if speedup and promised else None,
        dense_images_per_second=call.batch / dense.median if dense else None,
        sparse_images_per_second=call.batch / sparse.median if sparse else None,
        spread=max(timing.spread for timing in timings),
        peak_memory_bytes=timings[0].peak_memory,
    )


def _alternate(sides: Sequence[Model], call: _Call, repeats: int, task: Task) -> list[_Times]:
    """Times every side ``repeats`` times in turn, after one run each to warm up; that one records the graphs."""
    for side in sides:
        side.recordings.clear()  # of other batches, whose memory is not this row's
    seconds: list[list[float]] = [[] for _ in sides]
    peaks = [0] * len(sides)
    for repeat in range(repeats + 1):
        for index, side in enumerate(sides):
            reset_peak_memory(side.device)
            elapsed = call.seconds(side)
            peaks[index] = max(peaks[index], peak_memory_bytes(side.device))
            if repeat:
                seconds[index].append(elapsed)
            task.advance()
    return [_Times(own, peak) for own, peak in zip(seconds, peaks, strict=True)]


def _macs(model: Model, with_decoder: bool) -> int:
    """MACs per image of what the model executes: its plan, or the dense model."""
    config, tokenizer = model.config, model.tokenizer.config
    if model.plans is not None:
        cost = count_flops(config, tokenizer, {model.plans.name: model.plan}).sparse
    else:
        cost = count_flops(config, tokenizer).dense
    assert cost is not None and cost.end_to_end is not None
    return cost.end_to_end.macs if with_decoder else cost.transformer.macs


def _check(model: Model, against: Model | None, timing: Timing) -> None:
    problems = []
    if not timing.batches or min(timing.batches) < 1:
        problems.append(f"batches: {list(timing.batches)} given, one or more numbers of at least 1 needed")
    unknown = [name for name in timing.names if name not in DTYPES]
    if unknown or not timing.dtypes:
        problems.append(f"dtypes: {unknown or 'none'} given, known are {', '.join(DTYPES)}")
    if timing.decoder_dtype is not None and short_dtype(timing.decoder_dtype) not in DTYPES:
        problems.append(f"decoder_dtype: {timing.decoder_dtype} given, known are {', '.join(DTYPES)}")
    if timing.repeats < 1:
        problems.append(f"repeats: {timing.repeats} given, at least 1 needed")
    if against is not None:
        if against.is_sparse:
            problems.append("against: a sparse model given; compare with the dense model it was made from")
        if against.device != model.device:
            problems.append(f"against: on {against.device}, the model on {model.device}; put both on one device")
        ours, theirs = model.config, against.config
        if ours != theirs:
            differ = [name for name in type(ours).model_fields if getattr(ours, name) != getattr(theirs, name)]
            problems.append(f"against: another shape than the model's ({', '.join(differ)} differ)")
    if problems:
        raise InputError("this benchmark cannot run", problems)
