"""The routed part of an expert FFN on a GPU, in Triton: rows that chose alike share a tile, and no row is copied.

Rows are sorted by the set of experts that they chose, and a tile of M consecutive ones runs the union of its sets. So a
tile owns its output rows: it adds over experts in registers and stores once. No row is written K times, no two programs
add to the same place, and every row is the same sum in the same order whatever rows stand beside it. The price is
arithmetic: a row computes experts that only its neighbours in the tile chose, multiplied by zero.

Estimated for one block at the last scale, batch 64 with guidance, a token gate of 0.6, bf16, at 790 TFLOP/s and 4.3
TB/s; unions are sampled, all choices equally likely / some experts likelier, M 128:

           N     K of F    ms of K   of all F   of copying rows K times   union
    d16   256    5 of 11     0.13       0.29             0.19             7.7 / 5.9
    d16   512    3 of 6      0.16       0.31             0.11             3.2 / 3.1
    d24   256    7 of 17     0.27       0.67             0.39            13.6 / 9.7
    d24   768    3 of 6      0.35       0.70             0.17             3.2 / 3.1
    d30   256    9 of 21     0.44       1.03             0.63            17.7 / 13.1
    d30   960    3 of 6      0.55       1.10             0.21             3.2 / 3.1

A grouped product copies: K rows of C are written and read again on the way in and on the way out. Sorting by expert,
gathering in the load and adding the K partial rows in a last pass would still pay half of that. Few large experts have
few sets: there a tile computes 5 % more than the least, and that is all. With many small ones it computes most of F.

No GPU has run these kernels yet: the interpreter runs them and they compile for three GPUs, which shows no speed. They
stay only if ``benchmarks/gpu.py`` shows that they beat two ``torch.nn.functional.grouped_mm``.

Shapes as in ``expert_ffn``, and: T tiles of M rows, S = F slots for the experts of a tile.
"""

# Triton reads the annotations of a kernel, so pointers and numbers go without
# mypy: disallow-untyped-decorators=False, disallow-incomplete-defs=False, disallow-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from actvar_convert.kernels.expert_weights import ExpertWeights

SHARED_BYTES = 99 * 1024
"""Shared memory of a program if the device does not tell: that of the smaller GPUs since Ampere."""


class Tiling(NamedTuple):
    """Extents of the tiles of the two products; all powers of two from 16 on.

    Attributes:
        rows: M.
        neurons: hidden neurons of one program of the first product.
        channels: output channels of one program of the second.
        depth: terms of both that are in flight at once.
    """

    rows: int
    neurons: int
    channels: int
    depth: int


def tiling(rows: int, width: int, neurons: int, item: int) -> Tiling:
    """Tiles for R rows of C channels, experts of N neurons, numbers of ``item`` bytes.

    The widest rows that still leave every multiprocessor of a large GPU a program, since a tile reads its weights once
    for all of its rows; narrower ones if rows are few, whose union is smaller too.
    """
    widest = 256 if item < 4 else 64
    channels = _extent(width, widest)
    M = next((M for M in (128, 64, 32) if -(-rows // M) * -(-width // channels) >= 132), 16)
    return Tiling(M, _extent(neurons, widest), channels, 64 if item < 4 else 32)


def _extent(length: int, widest: int) -> int:
    """The extent that covers a length with the least work, a little of it charged to every tile."""
    extents = [extent for extent in (256, 128, 64, 32, 16) if extent <= widest]
    return min(extents, key=lambda extent: -(-length // extent) * (extent + 32))


def add_routed(y_RC: Tensor, x_RC: Tensor, weights: ExpertWeights, prefix: int, chosen_RK: Tensor) -> None:
    """Adds to y what the chosen experts yield. Static shapes; the host waits for nothing.

    Args:
        y_RC: contiguous, changed in place; R and K are at least 1.
        x_RC: rows, fp16, bf16 or fp32 as the weights.
        weights: of the FFN; F, its experts after the prefix, is at most 63.
        prefix: experts n that are left out here.
        chosen_RK: int64, which of the F experts each row runs, no expert twice.
    """
    (R, C), K, N, F = x_RC.shape, chosen_RK.shape[1], weights.neurons, weights.experts - prefix
    x_RC, w1, w2 = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (x_RC, weights.w1, weights.w2))
    tile = tiling(R, C, N, x_RC.element_size())
    T, F_padded = triton.cdiv(R, tile.rows), max(16, triton.next_power_of_2(F))
    integer = torch.int16 if F < 16 else torch.int32 if F < 32 else torch.int64
    new = x_RC.new_empty
    keys_R, experts_TS, counts_T = new(R, dtype=integer), new(T, F, dtype=torch.int32), new(T, dtype=torch.int32)
    hidden = new(T * tile.rows, F * N)
    with torch.cuda.device(x_RC.get_device()):
        _keys[(triton.cdiv(R, 64),)](chosen_RK.contiguous(), keys_R, R, K, K_PADDED=triton.next_power_of_2(K), BLOCK=64)
        keys_R, order_R = keys_R.sort(stable=True)
        _unions[(T,)](keys_R, experts_TS, counts_T, R, F, F_PADDED=F_padded, M=tile.rows)
        _hidden[(F * triton.cdiv(N, tile.neurons), T)](
            x_RC, w1, weights.b1, order_R, keys_R, experts_TS, counts_T, hidden, R, C, prefix, F,
            x_RC.stride(0), w1.stride(0), N=N, M=tile.rows, BLOCK_N=tile.neurons, BLOCK_C=tile.depth,
            EVEN=C % tile.depth == 0, **_launch(tile.rows, tile.neurons, tile.depth, x_RC),
        )  # fmt: skip
        _outputs[(triton.cdiv(C, tile.channels), T)](
            hidden, w2, order_R, experts_TS, counts_T, y_RC, R, C, prefix, F,
            w2.stride(0), N=N, M=tile.rows, BLOCK_C=tile.channels, BLOCK_N=tile.depth,
            EVEN=N % tile.depth == 0, **_launch(tile.rows, tile.channels, tile.depth, x_RC),
        )  # fmt: skip


def _launch(rows: int, columns: int, depth: int, x_RC: Tensor) -> dict[str, int]:
    """Warps of a program, and how many of its steps are in flight: two, or three if shared memory holds them.

    Before Hopper the step that is being multiplied stands in registers, so that one buffer less is needed.
    """
    available = SHARED_BYTES
    if x_RC.is_cuda:
        available = getattr(torch.cuda.get_device_properties(x_RC.device), "shared_memory_per_block_optin", available)
    term = (rows + columns) * x_RC.element_size()
    stages = (available - 1024 - 16 * term) // (depth * term) + (available < 200 * 1024)
    return {"num_warps": 8 if rows * columns > 128 * 128 else 4, "num_stages": max(2, min(3, stages))}


@triton.jit(do_not_specialize=["R", "K"])
def _keys(chosen_RK, keys_R, R, K, K_PADDED: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """The set of each row's experts as one integer, expert f being bit f.

    Experts are in order of importance, so that the highest bits are the rarest: sorted by them, most tiles lack many.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, K_PADDED)
    inside = (row < R)[:, None] & (slot < K)[None, :]
    expert = tl.load(chosen_RK + row[:, None] * K + slot[None, :], mask=inside, other=0)
    key = tl.sum(tl.where(inside, tl.full((BLOCK, K_PADDED), 1, tl.int64) << expert, 0), axis=1)
    tl.store(keys_R + row, key.to(keys_R.dtype.element_ty), mask=row < R)


@triton.jit(do_not_specialize=["R", "F"])
def _unions(keys_R, experts_TS, counts_T, R, F, F_PADDED: tl.constexpr, M: tl.constexpr) -> None:
    """The experts that any row of a tile chose, in ascending order, and their number."""
    tile = tl.program_id(0)
    place = tile * M + tl.arange(0, M)
    expert = tl.arange(0, F_PADDED)
    key = tl.load(keys_R + place, mask=place < R, other=0).to(tl.int64)
    used = tl.max(((key[:, None] >> expert[None, :]) & 1).to(tl.int32), axis=0)
    tl.store(experts_TS + tile * F + tl.cumsum(used, axis=0) - used, expert, mask=used > 0)
    tl.store(counts_T + tile, tl.sum(used, axis=0))


@triton.jit(do_not_specialize=["R", "prefix", "F"])
def _hidden(
    x_RC, w1_HC, b1_H, order_R, keys_R, experts_TS, counts_T, hidden,
    R, C, prefix, F, x_stride, w1_stride,
    N: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """gelu(x W1^T + b1) of one tile and some neurons of one of its experts; zero for rows that did not choose it.

    Rows are gathered in the load. Those beyond R are zero too; neurons beyond N repeat the first, and are not stored.
    """
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(1)
    slot = tl.program_id(0) // blocks
    if slot >= tl.load(counts_T + tile):
        return
    expert = tl.load(experts_TS + tile * F + slot)
    place = tile * M + tl.arange(0, M)
    live = place < R
    row = tl.load(order_R + place, mask=live, other=0)
    runs = (tl.load(keys_R + place, mask=live, other=0).to(tl.int64) >> expert) & 1
    neuron = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    owned = neuron < N
    unit = (prefix + expert).to(tl.int64) * N + tl.where(owned, neuron, 0)
    channel = tl.arange(0, BLOCK_C)
    x_at = x_RC + row[:, None] * x_stride + channel[None, :]
    w_at = w1_HC + unit[None, :] * w1_stride + channel[:, None]
    total = tl.zeros((M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, C, BLOCK_C):
        if EVEN:
            x = tl.load(x_at + begin)
            w = tl.load(w_at + begin)
        else:
            x = tl.load(x_at + begin, mask=(channel < C - begin)[None, :], other=0.0)
            w = tl.load(w_at + begin, mask=(channel < C - begin)[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    total += tl.load(b1_H + unit).to(tl.float32)[None, :]
    # tanh(z) = 2 sigmoid(2 z) - 1, so 0.5 v (1 + tanh(z)) = v sigmoid(2 z)
    active = total * tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
    active = tl.where(runs[:, None] != 0, active, 0.0)
    at = hidden + place[:, None].to(tl.int64) * (F * N) + slot * N + neuron[None, :]
    tl.store(at, active.to(hidden.dtype.element_ty), mask=owned[None, :])


@triton.jit(do_not_specialize=["R", "prefix", "F"])
def _outputs(
    hidden, w2_CH, order_R, experts_TS, counts_T, y_RC,
    R, C, prefix, F, w2_stride,
    N: tl.constexpr, M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """Adds to some channels of the rows of one tile what their experts yield."""
    tile = tl.program_id(1)
    place = tile * M + tl.arange(0, M)
    live = place < R
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    owned = channel < C
    keep = live[:, None] & owned[None, :]
    row = tl.load(order_R + place, mask=live, other=0)
    y_at = y_RC + row[:, None] * C + channel[None, :]
    # what is added to comes first: a second array of this extent after the loop would not fit the registers
    total = tl.load(y_at, mask=keep, other=0.0).to(tl.float32)
    neuron = tl.arange(0, BLOCK_N)
    h_at = hidden + place[:, None].to(tl.int64) * (F * N)
    w_at = w2_CH + tl.where(owned, channel, 0)[None, :].to(tl.int64) * w2_stride
    steps: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # one loop over all experts, so that loads of the next start before the last is done; its number comes a step ahead
    expert = tl.load(experts_TS + tile * F)
    for step in range(0, tl.load(counts_T + tile) * steps):
        slot = step // steps
        n = step % steps * BLOCK_N + neuron
        if EVEN:
            h = tl.load(h_at + (slot * N + n)[None, :])
            w = tl.load(w_at + ((prefix + expert) * N + n)[:, None])
        else:
            h = tl.load(h_at + (slot * N + n)[None, :], mask=(n < N)[None, :], other=0.0)
            w = tl.load(w_at + ((prefix + expert) * N + n)[:, None], mask=(n < N)[:, None], other=0.0)
        expert = tl.load(experts_TS + tile * F + tl.minimum((step + 1) // steps, F - 1))
        total = tl.dot(h, w, total, input_precision="ieee")
    tl.store(y_at, total.to(y_RC.dtype.element_ty), mask=keep)
