"""The expert FFN: an always-on prefix of experts plus the experts that each row selected.

Shapes: R rows (tokens), C width, H hidden neurons = E experts of N = H / E, expert e owning neurons e N to (e + 1) N;
F = E - n experts after a prefix of n, K of them chosen per row.

    y = b2 + sum over active e of f_e(x),   f_e(x) = W2[:, P_e] gelu(W1[P_e] x + b1[P_e])

In ``prefix``, ``masked`` and ``triton`` nothing is read back from the device and no branch depends on data: one of them
runs on a CUDA device, and whatever routes nothing takes ``prefix`` everywhere. ``loop`` does read how many rows each
expert has. On a CPU that waits for nothing, the numbers lie in the memory that the program itself works in; a grouped
product that keeps the counts in a tensor cost more (docs/experiments.md, 2026-11-23).
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.kernels.expert_weights import ExpertWeights
from actvar_convert.kernels.linear import linear, linear_gelu, linear_gelu_reference, watched

Backend = Literal["reference", "prefix", "masked", "loop", "triton"]

CPU_FLOPS = {torch.float32: 200e9, torch.bfloat16: 350e9}
"""Arithmetic per second of a dense FFN on two cores with AVX-512. This and the next three are fitted to whole FFNs of
``fashion``: C 256, N 64, 128 to 2048 rows (docs/experiments.md, 2026-11-23); other shapes are estimated."""
CPU_MASK = 1.06
"""Computing all experts and masking on a CPU, over the same without a mask."""
CPU_EXPERT_SECONDS = 70e-6
"""What starting the products of one routed expert costs on a CPU."""
CPU_CHANNEL_SECONDS = 0.66e-9
"""What gathering and adding one channel of one row for one routed expert costs on a CPU."""
MAX_FREE = 63
"""Experts after the prefix whose choice the fused kernels can hold as one integer."""


def pick_backend(x_RC: Tensor, weights: ExpertWeights, prefix: int, routed: int) -> Backend:
    """How to compute an expert FFN, by gradients, device, dtype and shape.

    What routes nothing is one product over a view of the weights. On a CPU skipping experts (``loop``) is weighed
    against computing all of them (``masked``) by the rates above. On a GPU nothing was measured: it is estimated that
    the fused kernels (``triton``) are fastest if they run there, since they copy no row and tiles of rows that chose
    alike share their reading of the weights; else all experts are computed.

    Args:
        x_RC: rows.
        weights: of the FFN.
        prefix: experts n that every row runs.
        routed: experts K that every row runs beyond them.
    """
    if torch.is_grad_enabled():
        return "reference"
    if not routed:
        return "prefix"
    free, R, C = weights.experts - prefix, len(x_RC), x_RC.shape[1]
    if watched() and not torch.compiler.is_compiling():  # a counter has to see the products that the plan promises
        return "loop"
    if x_RC.is_cuda:
        fits = x_RC.dtype in (torch.bfloat16, torch.float16) and weights.neurons >= 16 and free <= MAX_FREE
        return "triton" if fits and not torch.compiler.is_compiling() and triton_works(x_RC.device) else "masked"
    rate = CPU_FLOPS.get(x_RC.dtype)
    if rate is None or x_RC.device.type != "cpu" or torch.compiler.is_compiling():
        return "loop"
    one = 4 * R * C * weights.neurons / rate  # seconds of one expert for all rows
    loop = routed * one + free * CPU_EXPERT_SECONDS + routed * R * C * CPU_CHANNEL_SECONDS
    return "loop" if loop <= CPU_MASK * free * one else "masked"


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether the fused kernels run on a device: tried once, since what can keep them from it only shows then.

    That is a Triton that is not installed, a C compiler that is not there, a GPU that is too old, or wrong results.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 32), (64, 32), (64,), (32, 64), (32,))
    x_RC, w1, b1, w2, b2 = (
        torch.randn(shape, generator=generator).mul(0.3).to(device, torch.float16) for shape in shapes
    )
    weights = ExpertWeights(w1, b1, w2, b2, experts=4)
    chosen_RK = torch.rand(20, 3, generator=generator).topk(2).indices.to(device)
    with torch.no_grad():
        try:
            got = expert_ffn_triton(x_RC, weights, 1, chosen_RK)
        except Exception:  # a compiler or a driver may raise anything, and there are other backends
            return False
        return torch.allclose(got, expert_ffn_masked(x_RC, weights, 1, selection_mask(chosen_RK, 3)), atol=0.02)


def expert_ffn(x_RC: Tensor, weights: ExpertWeights, prefix: int, chosen_RK: Tensor) -> Tensor:
    """The expert FFN of rows that each run K experts beyond the prefix, by the backend that ``pick_backend`` takes.

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
    backend = pick_backend(x_RC, weights, prefix, chosen_RK.shape[1])
    if backend == "prefix":
        return expert_ffn_prefix(x_RC, weights, prefix)
    if backend == "triton":
        return expert_ffn_triton(x_RC, weights, prefix, chosen_RK)
    return _by_mask(backend, x_RC, weights, prefix, selection_mask(chosen_RK, weights.experts - prefix))


def _autocasts(x_RC: Tensor) -> bool:
    """Whether autocast would change dtypes between the operations of the paths that work in place."""
    return torch.is_autocast_enabled(x_RC.device.type) and not torch.is_grad_enabled()


def _lowered(x_RC: Tensor, weights: ExpertWeights) -> tuple[Tensor, ExpertWeights]:
    dtype = torch.get_autocast_dtype(x_RC.device.type)
    return x_RC.to(dtype), weights.to(dtype)


def selection_mask(chosen_RK: Tensor, free: int) -> Tensor:
    """Boolean [R, F] of chosen experts [R, K]; further leading axes are kept."""
    mask = torch.zeros(*chosen_RK.shape[:-1], free, dtype=torch.bool, device=chosen_RK.device)
    return mask.scatter_(-1, chosen_RK, True)


def _by_mask(backend: Backend, x_RC: Tensor, weights: ExpertWeights, prefix: int, routed_RF: Tensor) -> Tensor:
    if backend == "reference":
        always = routed_RF.new_ones(len(x_RC), prefix)
        return expert_ffn_reference(x_RC, weights, torch.cat((always, routed_RF), dim=1))
    if backend == "masked":
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
    return F.linear(hidden, weights.w2, weights.b2)


def expert_ffn_prefix(x_RC: Tensor, weights: ExpertWeights, prefix: int) -> Tensor:
    """Rows that run the prefix alone: one product over a view; nothing is gathered or masked.

    Returns a new tensor [R, C].
    """
    shared = prefix * weights.neurons
    if not shared:
        return weights.b2.expand(len(x_RC), -1).clone()
    hidden = linear_gelu(x_RC, weights.w1[:shared], weights.b1[:shared])
    return linear(hidden, weights.w2[:, :shared], weights.b2)


def expert_ffn_masked(x_RC: Tensor, weights: ExpertWeights, prefix: int, routed_RF: Tensor) -> Tensor:
    """The reference without gradients, in whole products and in place: for few rows, whose products are cheap."""
    mask = routed_RF.to(x_RC.dtype)
    hidden = linear_gelu(x_RC, weights.w1, weights.b1)
    hidden.view(len(x_RC), weights.experts, weights.neurons)[:, prefix:].mul_(mask.unsqueeze(-1))
    return linear(hidden, weights.w2, weights.b2)


def expert_ffn_loop(x_RC: Tensor, weights: ExpertWeights, prefix: int, routed_RF: Tensor) -> Tensor:
    """Computes active experts only: the prefix as one product over a view, then one gathered product per routed expert.

    Takes any number of experts per row, and any dtype. One expert at a time, so that its rows stay in the
    cache of the processor between the gather and the sum. Reads how many rows each expert has, for which a GPU would
    have to be waited for: no plan takes this backend there (see above). Returns [R, C].
    """
    N = weights.neurons
    y = expert_ffn_prefix(x_RC, weights, prefix)
    experts, rows = routed_RF.T.nonzero(as_tuple=True)
    counts = torch.bincount(experts, minlength=routed_RF.shape[1]).tolist()
    for offset, own_rows in enumerate(torch.split(rows, counts)):
        if len(own_rows):
            expert = prefix + offset
            own = slice(expert * N, (expert + 1) * N)
            hidden = linear_gelu(x_RC.index_select(0, own_rows), weights.w1[own], weights.b1[own])
            y.index_add_(0, own_rows, linear(hidden, weights.expert_columns(expert), None))
    return y


def expert_ffn_triton(x_RC: Tensor, weights: ExpertWeights, prefix: int, chosen_RK: Tensor) -> Tensor:
    """The same with the fused kernels of ``expert_ffn_triton``: no row is copied, and nothing waits for the device.

    Needs Triton, no gradients, and at most 63 experts after the prefix. Returns [R, C].
    """
    from actvar_convert.kernels.expert_ffn_triton import add_routed

    y = expert_ffn_prefix(x_RC, weights, prefix)
    if chosen_RK.numel():
        add_routed(y, x_RC, weights, prefix, chosen_RK)
    return y
