"""Which way an expert FFN is computed, by device, number format and shape: the table and its reasons.

What a way takes is counted from FLOPs, bytes and operations at the rates below; those of the CPU were fitted to
measurements, those of the GPU are partly assumed. Nothing here reads a tensor, so the choice waits for nothing and the
table can be printed for any machine.

Letters as in ``expert_ffn``: R rows, C width, E experts of N neurons, F of them after the prefix, K of those per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

Way = Literal["reference", "prefix", "masked", "loop", "grouped", "triton"]
Observer = Literal["nobody", "counter", "compiler"]
"""Who looks on: something that counts or traces operations as they run, or a compiler."""

CPU_FLOPS = {torch.float32: 200e9, torch.bfloat16: 350e9}
"""Arithmetic per second of a dense FFN on two cores with AVX-512, fitted like the next three (docs/experiments.md)."""

CPU_EXPERT_SECONDS = 70e-6
"""What starting the products of one routed expert costs."""

CPU_CHANNEL_SECONDS = 0.66e-9
"""What gathering and adding one channel of one row for one routed expert costs."""

CPU_MASK = 1.06
"""Computing all experts and masking, over the same without a mask."""

GPU_FLOPS: dict[Way, float] = {"masked": 790e12, "triton": 550e12, "grouped": 400e12}
"""Arithmetic per second on a large GPU in 16-bit formats: whole products as measured on an H200, the others assumed."""

GPU_BYTES = 4.3e12
"""Memory traffic per second of the same GPU, measured."""

GPU_STEPS: dict[Way, int] = {"masked": 6, "triton": 10, "grouped": 20}
GPU_STEP_SECONDS = 3e-6
"""Operations that each way starts beyond the prefix, and what starting one costs in a CUDA graph; assumed."""

MAX_FREE = 63
"""Experts after the prefix whose choice the fused kernels can hold as one integer."""


class FFNShape(NamedTuple):
    """What the choice depends on.

    Attributes:
        device: type of the device, such as cpu or cuda.
        dtype: number format of rows and weights.
        rows: R; width: C; neurons: N; experts: E; prefix: n.
        routed: K.
    """

    device: str
    dtype: torch.dtype
    rows: int
    width: int
    neurons: int
    experts: int
    prefix: int
    routed: int

    @property
    def free(self) -> int:
        """F, the experts after the prefix."""
        return self.experts - self.prefix

    @property
    def expert_flops(self) -> int:
        """FLOPs of one expert for all rows."""
        return 4 * self.rows * self.width * self.neurons


class Choice(NamedTuple):
    """A way and why it was taken."""

    way: Way
    reason: str


def choose(shape: FFNShape, *, gradients: bool = False, observer: Observer = "nobody", triton: bool = False) -> Choice:
    """How to compute an expert FFN.

    Args:
        shape: of the FFN and its rows.
        gradients: whether they are wanted.
        observer: who looks on; a counter has to see the products that the plan promises, and no others.
        triton: whether the fused kernels run on this device.
    """
    if gradients:
        return Choice("reference", "gradients are wanted")
    if shape.routed == 0:
        return Choice("prefix", "nothing is routed: one product over a view")
    if shape.device == "cpu":
        return _on_cpu(shape, observer)
    if observer == "counter" or shape.device != "cuda":
        return Choice("loop", "plain operations only, one product per expert")
    costs = gpu_seconds(shape)
    if observer == "compiler" or not triton:
        costs.pop("triton", None)
    best = min(costs, key=lambda way: costs[way])
    return Choice(best, _GPU_REASONS[best] if len(costs) > 1 else "no way that skips takes this format and shape")


def _on_cpu(shape: FFNShape, observer: Observer) -> Choice:
    if observer != "nobody":
        return Choice("loop", "plain operations only, one product per expert")
    if shape.dtype not in CPU_FLOPS:
        return Choice("loop", "not measured in this format")
    costs = cpu_seconds(shape)
    if costs["loop"] <= costs["masked"]:
        return Choice("loop", "skipping saves more than gathering costs, as fitted")
    return Choice("masked", "skipping saves less than gathering costs, as fitted")


def cpu_seconds(shape: FFNShape) -> dict[Way, float]:
    """What each way would take on two cores with AVX-512, beyond the prefix."""
    free, routed = shape.free, shape.routed
    one = shape.expert_flops / CPU_FLOPS.get(shape.dtype, CPU_FLOPS[torch.float32])
    gathered = routed * shape.rows * shape.width * CPU_CHANNEL_SECONDS
    return {"masked": CPU_MASK * free * one, "loop": routed * one + free * CPU_EXPERT_SECONDS + gathered}


def ffn_seconds(shape: FFNShape, *, triton: bool = False) -> float:
    """What a whole expert FFN would take, the best way: prefix and routed experts."""
    seconds = shape.prefix * shape.expert_flops / product_flops(shape.device, shape.dtype)
    if shape.routed:
        costs = gpu_seconds(shape) if shape.device == "cuda" else cpu_seconds(shape)
        if not triton:
            costs.pop("triton", None)
        seconds += min(costs.values())
    return seconds


def product_flops(device: str, dtype: torch.dtype) -> float:
    """Arithmetic per second that ``ffn_seconds`` counts whole products with."""
    return GPU_FLOPS["masked"] if device == "cuda" else CPU_FLOPS.get(dtype, CPU_FLOPS[torch.float32])


_GPU_REASONS: dict[Way, str] = {
    "masked": "computing all experts and masking takes least, as counted: no row moves",
    "grouped": "one product per expert over copied rows takes least, as counted",
    "triton": "tiles of rows that chose alike take least, as counted: no row is copied",
}


def gpu_seconds(shape: FFNShape) -> dict[Way, float]:
    """What each way that takes a shape would take on a large GPU, beyond the prefix; counted."""
    R, C, N, F, K = shape.rows, shape.width, shape.neurons, shape.free, shape.routed
    item = shape.dtype.itemsize
    # hidden values: GELU and mask read and write each once more; then W2 reads what W1 wrote
    moved: dict[Way, float] = {"masked": 6 * R * F * N * item}
    computed: dict[Way, float] = {"masked": F}
    if shape.dtype in (torch.bfloat16, torch.float16) and K and N >= 16 and F <= MAX_FREE:
        computed["triton"] = expected_union(R, F, K)
        moved["triton"] = 2 * R * (computed["triton"] * N + C) * item
    if shape.dtype == torch.bfloat16 and N * item % 16 == 0 and C * item % 16 == 0:
        computed["grouped"] = K
        # rows copied in and partial rows out, each written and read; the bias reads and writes hidden values too
        moved["grouped"] = R * K * (4 * C + 6 * N) * item
    return {
        way: shape.expert_flops * experts / GPU_FLOPS[way] + moved[way] / GPU_BYTES + GPU_STEPS[way] * GPU_STEP_SECONDS
        for way, experts in computed.items()
    }


def expected_union(rows: int, free: int, routed: int, tile: int = 128) -> float:
    """About how many experts a tile of rows sorted by their choices runs, when all choices are equally likely.

    Sorting settles log2(tiles) bits, an expert takes h(K / F) of them, and 1 - K / F of those settled are absent; half
    an expert is added for tiles that lie across a border. Choices that are not equally likely lead to less.
    """
    if not 0 < routed < free:
        return float(routed)
    share, tiles = routed / free, max(1.0, rows / tile)
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    absent = min(free - routed, (1 - share) * math.log2(tiles) / entropy)
    return min(float(free), free - absent + 0.5)


class WayRow(NamedTuple):
    """One line of the table.

    Attributes:
        shape: what was asked for.
        choice: the way that is taken, and why.
        microseconds: what each way would take beyond the prefix, as counted for the device; empty where nothing is
            weighed.
    """

    shape: FFNShape
    choice: Choice
    microseconds: dict[Way, float]


def way_table(shapes: Iterable[FFNShape], *, triton: bool) -> list[WayRow]:
    """The choice for every shape at inference; ``triton`` says whether the fused kernels run on the device."""
    rows = []
    for shape in shapes:
        rows.append(
            WayRow(shape, choose(shape, triton=triton), {way: 1e6 * each for way, each in _weighed(shape).items()})
        )
    return rows


def _weighed(shape: FFNShape) -> dict[Way, float]:
    """The seconds that ``choose`` compares for a shape."""
    if shape.device == "cpu" and shape.routed != 0 and shape.dtype in CPU_FLOPS:
        return cpu_seconds(shape)
    return gpu_seconds(shape) if shape.device == "cuda" and shape.routed else {}
