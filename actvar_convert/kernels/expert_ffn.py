"""The expert FFN: an always-on prefix of experts plus the experts that each row selected.

Shapes: R rows (tokens), C width, H hidden neurons = E experts of N = H / E, expert e owning neurons e N to (e + 1) N;
F = E - n experts after a prefix of n, K of them chosen per row.

    y = b2 + sum over active e of f_e(x) + sum over inactive e of m_e,   f_e(x) = W2[:, P_e] gelu(W1[P_e] x + b1[P_e])

In ``prefix``, ``masked``, ``grouped`` and ``triton`` nothing is read back from the device and no branch depends on
data: one of them runs on a CUDA device, and what routes nothing everywhere. ``loop`` does read
how many rows each expert has. On a CPU that waits for nothing, the numbers lie in the memory that the program itself
works in, and the alternative costs more: with the counts kept in a tensor (``grouped``) 2,048 rows of ``fashion`` take
17.1 ms in fp32 against 9.1 ms, in bf16 5.7 against 5.6 (docs/experiments.md, 2026-11-23). Room for a fixed number of
rows per expert would have to be that of all rows, which is ``masked``, or drop some.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.kernels.expert_weights import ExpertWeights
from actvar_convert.kernels.linear import linear, linear_gelu, linear_gelu_reference, watched
from actvar_convert.kernels.ways import FFNShape, Observer, Way, choose


def choose_way(x_RC: Tensor, weights: ExpertWeights, prefix: int, routed: int) -> Way:
    """How to compute an expert FFN, by gradients, device, number format and shape.

    Args:
        x_RC: rows.
        weights: of the FFN.
        prefix: experts n that every row runs.
        routed: experts K that every row runs beyond them.
    """
    shape = FFNShape(
        x_RC.device.type, x_RC.dtype, len(x_RC), x_RC.shape[1], weights.neurons, weights.experts, prefix, routed
    )
    observer: Observer = "compiler" if torch.compiler.is_compiling() else "counter" if watched() else "nobody"
    triton = observer == "nobody" and x_RC.is_cuda and triton_works(x_RC.device)
    return choose(shape, gradients=torch.is_grad_enabled(), observer=observer, triton=triton).way


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether the fused kernels run on a device: tried once, since what can keep them from it only shows then.

    That is a Triton that is not installed, a C compiler that is not there, a GPU that is too old, or wrong results.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 32), (64, 32), (64,), (32, 64), (32,), (4, 32))
    x_RC, w1, b1, w2, b2, inactive = (
        torch.randn(shape, generator=generator).mul(0.3).to(device, torch.float16) for shape in shapes
    )
    weights = ExpertWeights(w1, b1, w2, b2, inactive)
    chosen_RK = torch.rand(20, 3, generator=generator).topk(2).indices.to(device)
    with torch.no_grad():
        try:
            got = expert_ffn_triton(x_RC, weights, 1, chosen_RK)
        except Exception:  # a compiler or a driver may raise anything, and there are other ways
            return False
        return torch.allclose(got, expert_ffn_masked(x_RC, weights, 1, selection_mask(chosen_RK, 3)), atol=0.02)


def expert_ffn(x_RC: Tensor, weights: ExpertWeights, prefix: int, chosen_RK: Tensor) -> Tensor:
    """The expert FFN of rows that each run K experts beyond the prefix, the way that is fastest here.

    Args:
        x_RC: rows.
        weights: of the FFN.
        prefix: experts n that every row runs.
        chosen_RK: int64, which of the F experts after the prefix each row runs, no expert twice.

    Returns:
        [R, C].
    """
    if _autocasts(x_RC):
        with torch.autocast(x_RC.device.type, enabled=False):
            return expert_ffn(*_lowered(x_RC, weights), prefix, chosen_RK)
    way = choose_way(x_RC, weights, prefix, chosen_RK.shape[1])
    if way == "prefix":
        return expert_ffn_prefix(x_RC, weights, prefix)
    if way == "grouped":
        return expert_ffn_grouped(x_RC, weights, prefix, chosen_RK)
    if way == "triton":
        return expert_ffn_triton(x_RC, weights, prefix, chosen_RK)
    return _by_mask(way, x_RC, weights, prefix, selection_mask(chosen_RK, weights.experts - prefix))


def _autocasts(x_RC: Tensor) -> bool:
    """Whether autocast would change number formats between the operations of the paths that work in place."""
    return torch.is_autocast_enabled(x_RC.device.type) and not torch.is_grad_enabled()


def _lowered(x_RC: Tensor, weights: ExpertWeights) -> tuple[Tensor, ExpertWeights]:
    dtype = torch.get_autocast_dtype(x_RC.device.type)
    return x_RC.to(dtype), weights.to(dtype)


def selection_mask(chosen_RK: Tensor, free: int) -> Tensor:
    """Boolean [R, F] of chosen experts [R, K]; further leading axes are kept."""
    mask = torch.zeros(*chosen_RK.shape[:-1], free, dtype=torch.bool, device=chosen_RK.device)
    return mask.scatter_(-1, chosen_RK, True)


def _by_mask(way: Way, x_RC: Tensor, weights: ExpertWeights, prefix: int, routed_RF: Tensor) -> Tensor:
    if way == "reference":
        always = routed_RF.new_ones(len(x_RC), prefix)
        return expert_ffn_reference(x_RC, weights, torch.cat((always, routed_RF), dim=1))
    if way == "masked":
        return expert_ffn_masked(x_RC, weights, prefix, routed_RF)
    return expert_ffn_loop(x_RC, weights, prefix, routed_RF)


def expert_ffn_reference(x_RC: Tensor, weights: ExpertWeights, active_RE: Tensor) -> Tensor:
    """The obvious form: every neuron is computed, and those of inactive experts are multiplied by zero.

    Differentiable in x and in the weights. ``active_RE`` is boolean (or 0 and 1) and covers the prefix too.
    Returns [R, C].
    """
    mask = active_RE.to(x_RC.dtype)
    hidden = linear_gelu_reference(x_RC, weights.w1, weights.b1)
    hidden = (hidden.view(len(x_RC), weights.experts, weights.neurons) * mask.unsqueeze(-1)).flatten(1)
    return F.linear(hidden, weights.w2, weights.b2) + (1 - mask) @ weights.inactive.to(x_RC.dtype)


def expert_ffn_prefix(x_RC: Tensor, weights: ExpertWeights, prefix: int) -> Tensor:
    """Rows that run the prefix alone: one product over a view, where nothing is gathered or masked.

    Returns a new tensor [R, C]: the prefix, the bias, and the constants of all experts after it.
    """
    shared = prefix * weights.neurons
    bias = weights.resting_bias(prefix, x_RC.dtype)
    if not shared:
        return bias.expand(len(x_RC), -1).clone()
    hidden = linear_gelu(x_RC, weights.w1[:shared], weights.b1[:shared])
    return linear(hidden, weights.w2[:, :shared], bias)


def expert_ffn_masked(x_RC: Tensor, weights: ExpertWeights, prefix: int, routed_RF: Tensor) -> Tensor:
    """The reference without gradients, in whole products and in place: for few rows, where products are cheap."""
    mask = routed_RF.to(x_RC.dtype)
    hidden = linear_gelu(x_RC, weights.w1, weights.b1)
    hidden.view(len(x_RC), weights.experts, weights.neurons)[:, prefix:].mul_(mask.unsqueeze(-1))
    y = linear(hidden, weights.w2, weights.resting_bias(prefix, x_RC.dtype))
    return y.addmm_(mask, weights.inactive[prefix:].to(x_RC.dtype), alpha=-1)


def expert_ffn_loop(x_RC: Tensor, weights: ExpertWeights, prefix: int, routed_RF: Tensor) -> Tensor:
    """Computes active experts only: the prefix as one product over a view, then one gathered product per routed expert.

    Takes any number of experts per row, and any number format. One expert at a time, so that its rows stay in the
    cache of the processor between the gather and the sum. Reads how many rows each expert has, for which a GPU would
    have to be waited for: no plan takes this way there (see above). Returns [R, C].
    """
    N = weights.neurons
    constants = weights.inactive[prefix:].to(x_RC.dtype)
    y = expert_ffn_prefix(x_RC, weights, prefix).addmm_(routed_RF.to(x_RC.dtype), constants, alpha=-1)
    experts, rows = routed_RF.T.nonzero(as_tuple=True)
    counts = torch.bincount(experts, minlength=routed_RF.shape[1]).tolist()
    for offset, own_rows in enumerate(torch.split(rows, counts)):
        if len(own_rows):
            expert = prefix + offset
            own = slice(expert * N, (expert + 1) * N)
            hidden = linear_gelu(x_RC.index_select(0, own_rows), weights.w1[own], weights.b1[own])
            y.index_add_(0, own_rows, linear(hidden, weights.expert_columns(expert), None))
    return y


def expert_ffn_grouped(x_RC: Tensor, weights: ExpertWeights, prefix: int, chosen_RK: Tensor) -> Tensor:
    """The same with one sort of all (row, expert) pairs, one gather, and two grouped products; static shapes.

    The number of rows of an expert stays on the device, nothing waits for it. Every output row is the sum of its own K
    partial rows in a fixed order. Returns [R, C].
    """
    N, K, free = weights.neurons, chosen_RK.shape[1], weights.experts - prefix
    constants = weights.inactive[prefix:].to(x_RC.dtype)
    y = expert_ffn_prefix(x_RC, weights, prefix)
    if chosen_RK.numel() == 0:
        return y
    expert, order = chosen_RK.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(free, device=expert.device), right=True, out_int32=True)
    w1_FCN = weights.w1.reshape(weights.experts, N, -1)[prefix:].transpose(1, 2)
    w2_FNC = weights.w2.reshape(-1, weights.experts, N)[:, prefix:].permute(1, 2, 0)
    hidden = F.grouped_mm(x_RC.index_select(0, order // K), w1_FCN, offs=ends)
    hidden = hidden.add_(weights.b1.reshape(weights.experts, N)[prefix:].index_select(0, expert))
    partial = F.grouped_mm(F.gelu(hidden, approximate="tanh"), w2_FNC, offs=ends)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view_as(chosen_RK)
    y = y.add_(F.embedding_bag(place, partial, mode="sum"))
    return y.sub_(F.embedding_bag(chosen_RK, constants, mode="sum"))


def expert_ffn_triton(x_RC: Tensor, weights: ExpertWeights, prefix: int, chosen_RK: Tensor) -> Tensor:
    """The same with the fused kernels of ``expert_ffn_triton``: no row is copied, and nothing waits for the device.

    Needs Triton, no gradients, and at most 63 experts after the prefix. Returns [R, C].
    """
    from actvar_convert.kernels.expert_ffn_triton import add_routed

    constants = weights.inactive[prefix:].to(x_RC.dtype)
    y = expert_ffn_prefix(x_RC, weights, prefix)
    if chosen_RK.numel():
        add_routed(y, x_RC, weights, constants, prefix, chosen_RK)
    return y
