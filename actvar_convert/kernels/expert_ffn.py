"""The expert FFN: an always-on prefix of experts plus the experts that each row selected.

Shapes: R rows (tokens), C width, H hidden neurons = E experts of N = H / E, expert e owning neurons e N to (e + 1) N.

    y = b2 + sum over active e of f_e(x) + sum over inactive e of m_e,   f_e(x) = W2[:, P_e] gelu(W1[P_e] x + b1[P_e])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ExpertWeights(NamedTuple):
    """Weights of one FFN in expert order.

    Attributes:
        w1: [H, C]; b1: [H]; w2: [C, H]; b2: [C].
        inactive: constants m [E, C] that experts contribute when they do not run.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    inactive: Tensor

    @property
    def experts(self) -> int:
        return self.inactive.shape[0]

    @property
    def neurons(self) -> int:
        """Neurons N of one expert."""
        return self.w1.shape[0] // self.inactive.shape[0]


def expert_ffn_reference(x_RC: Tensor, weights: ExpertWeights, active_RE: Tensor) -> Tensor:
    """The obvious form: every neuron is computed, and those of inactive experts are multiplied by zero.

    Differentiable in x and in the weights. ``active_RE`` is boolean (or 0 and 1) and covers the prefix too.
    Returns [R, C].
    """
    mask = active_RE.to(x_RC.dtype)
    hidden = F.gelu(F.linear(x_RC, weights.w1, weights.b1), approximate="tanh")
    hidden = (hidden.view(len(x_RC), weights.experts, weights.neurons) * mask.unsqueeze(-1)).flatten(1)
    return F.linear(hidden, weights.w2, weights.b2) + (1 - mask) @ weights.inactive.to(x_RC.dtype)


def expert_ffn_loop(x_RC: Tensor, weights: ExpertWeights, prefix: int, routed_RF: Tensor) -> Tensor:
    """Computes active experts only: the prefix as one product over a view, then one gathered product per routed expert.

    Args:
        x_RC: rows.
        weights: of the FFN.
        prefix: experts n that every row runs.
        routed_RF: boolean [R, E - n]: which of the remaining experts each row runs.

    Returns:
        [R, C], equal to the reference up to summation order.
    """
    N, shared = weights.neurons, prefix * weights.neurons
    bias = weights.b2 + weights.inactive[prefix:].sum(0).to(weights.b2.dtype)
    if shared:
        hidden = F.gelu(F.linear(x_RC, weights.w1[:shared], weights.b1[:shared]), approximate="tanh")
        y = F.linear(hidden, weights.w2[:, :shared], bias)
    else:
        y = bias.to(x_RC.dtype).expand(len(x_RC), -1).clone()
    rows, experts = routed_RF.T.nonzero(as_tuple=True)[::-1]
    counts = torch.bincount(experts, minlength=routed_RF.shape[1]).tolist()
    begin = 0
    for offset, count in enumerate(counts):
        if count:
            chosen = rows[begin : begin + count]
            expert = prefix + offset
            own = slice(expert * N, (expert + 1) * N)
            hidden = F.gelu(F.linear(x_RC[chosen], weights.w1[own], weights.b1[own]), approximate="tanh")
            minus = -weights.inactive[expert].to(weights.b2.dtype)
            y.index_add_(0, chosen, F.linear(hidden, weights.w2[:, own], minus))
        begin += count
    return y
