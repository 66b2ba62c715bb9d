"""Weight sparsity: an FFN split into experts, and the router that picks them per token.

Shapes: B rows, L tokens, C width, H hidden, E experts of N neurons, F experts after the prefix.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.kernels.expert_ffn import expert_ffn
from actvar_convert.kernels.expert_weights import DerivedWeights, ExpertWeights
from actvar_convert.kernels.linear import linear, linear_gelu, watched
from actvar_convert.models.base import Span
from actvar_convert.plan import Plans


class Router(nn.Module):
    """Predicts the size of each expert's contribution, ||f_e(x)||, from the input of the FFN: score(x) = W x + b.

    A regression instead of a classification suits a GELU (after D2DMoE, arXiv 2310.04361).
    """

    role: ClassVar = "router"
    component: ClassVar = "router"

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, experts)

    def forward(self, x_BLC: Tensor, last: int | None = None) -> Tensor:
        """Scores [B, L, F] of all experts that the router knows, or of the ``last`` ones only."""
        begin = 0 if last is None else self.linear.out_features - last
        return F.linear(x_BLC, self.linear.weight[begin:], self.linear.bias[begin:])


def selection(score_BLF: Tensor, routed: int) -> Tensor:
    """Boolean selection [B, L, F] of the ``routed`` largest scores."""
    chosen = score_BLF.topk(routed, dim=-1).indices
    return torch.zeros_like(score_BLF, dtype=torch.bool).scatter_(-1, chosen, True)


class ExpertFFN(nn.Module):
    """Takes the place of a block's FFN: neurons are reordered into experts, and a scale runs only some of them.

    y = b2 + sum_{e active} f_e(x), the active experts being the first n of the block (n and K depend on the scale) and
    the K best of the others by the router's score.

    Args:
        width, hidden: C and H. bias: whether the dense FFN has biases.
        index: of the block. plans: of the model.

    Attributes:
        permutation: [H] int64, the dense model's index of every neuron.

    With gradients enabled inactive experts are multiplied by zero (static shapes); without, they are not computed if
    that is faster (``kernels.expert_ffn``).
    """

    permutation: Tensor

    def __init__(self, width: int, hidden: int, bias: bool, index: int, plans: Plans) -> None:
        super().__init__()
        self.index, self.plans = index, plans
        self.experts = plans.current.experts
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)
        self.register_buffer("permutation", torch.arange(hidden))
        self.scored = max(each.router_experts(index) for each in plans)
        self.router = Router(width, self.scored) if self.scored else None
        self._derived = DerivedWeights()

    def weights(self) -> ExpertWeights:
        """Weights of the FFN in expert order.

        On a CPU backends that need them otherwise laid out keep that; CUDA graphs read the weights where they are.
        """
        w1, b1, w2, b2 = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        plain = w2.device.type != "cpu" or torch.is_autocast_enabled("cpu") or watched()
        b1 = w1.new_zeros(len(w1)) if b1 is None else b1
        b2 = w2.new_zeros(len(w2)) if b2 is None else b2
        return ExpertWeights(w1, b1, w2, b2, self.experts, None if plain else self._derived)

    def hidden(self, x_BLC: Tensor) -> Tensor:
        """Hidden activations [..., H] of all neurons, in expert order."""
        return F.gelu(F.linear(x_BLC, self.fc1.weight, self.fc1.bias), approximate="tanh")

    def scores(self, x_BLC: Tensor, scale: int) -> Tensor:
        """The router's scores [B, L, E - n] of the experts after the prefix, for tokens of one scale."""
        assert self.router is not None
        plan = self.plans.current
        free, known = self.experts - plan.blocks[self.index].prefix[scale], plan.router_experts(self.index)
        score: Tensor = self.router(x_BLC, known)[..., known - free :]
        return score

    def route(self, x_BLC: Tensor, scale: int) -> Tensor:
        """Boolean choice [B, L, E - n] among the experts after the prefix, for tokens of one scale."""
        plan = self.plans.current
        own = plan.blocks[self.index]
        if plan.routes(self.index, scale):
            return selection(self.scores(x_BLC, scale), own.routed[scale])
        free = self.experts - own.prefix[scale]
        return x_BLC.new_full((*x_BLC.shape[:2], free), own.routed[scale] > 0, dtype=torch.bool)

    def active(self, x_BLC: Tensor, scale: int) -> Tensor:
        """Which experts tokens of one scale run, boolean [B, L, E]."""
        runs = torch.ones(*x_BLC.shape[:2], self.experts, dtype=torch.bool, device=x_BLC.device)
        plan = self.plans.current
        if not plan.runs_all(self.index, scale):
            runs[..., plan.blocks[self.index].prefix[scale] :] = self.route(x_BLC, scale)
        return runs

    def forward(self, x_BLC: Tensor, span: Span) -> Tensor:
        """FFN output [B, L, C] of the tokens in hand."""
        pieces = [
            self._one_scale(x, scale)
            for scale, x in zip(span.levels, torch.split(x_BLC, list(span.counts), dim=1), strict=True)
            if x.shape[1]
        ]
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0] if pieces else x_BLC

    def _one_scale(self, x_BLC: Tensor, scale: int) -> Tensor:
        plan = self.plans.current
        if plan.runs_all(self.index, scale):
            return linear(linear_gelu(x_BLC, self.fc1.weight, self.fc1.bias), self.fc2.weight, self.fc2.bias)
        own, rows = plan.blocks[self.index], x_BLC.flatten(0, 1)
        if own.routed[scale]:
            chosen = self.scores(x_BLC, scale).topk(own.routed[scale], dim=-1, sorted=False).indices.flatten(0, 1)
        else:
            chosen = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        return expert_ffn(rows, self.weights(), own.prefix[scale], chosen).view_as(x_BLC)
