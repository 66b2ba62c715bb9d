"""Weight sparsity: an FFN split into experts, and the router that picks them per token.

Shapes: B rows, L tokens, C width, H hidden, E experts of N neurons, F experts after the prefix, S scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.kernels.expert_ffn import expert_ffn, selection_mask
from actvar_convert.kernels.expert_weights import DerivedWeights, ExpertWeights
from actvar_convert.kernels.linear import linear, linear_gelu, watched
from actvar_convert.models.config import TransformerConfig
from actvar_convert.models.var import Span
from actvar_convert.plan import SparsityPlan


class Router(nn.Module):
    """Predicts the size of each expert's contribution, ||f_e(x)||, from the input of the FFN.

    score(x) = W x + b. A regression instead of a classification suits a GELU (after D2DMoE, arXiv 2310.04361).
    """

    def __init__(self, channels: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, experts)

    def forward(self, x_BLC: Tensor, last: int | None = None) -> Tensor:
        """Scores [B, L, F] of all experts that the router knows, or of the ``last`` ones only."""
        begin = 0 if last is None else self.linear.out_features - last
        return F.linear(x_BLC, self.linear.weight[begin:], self.linear.bias[begin:])


class ExpertFFN(nn.Module):
    """What changes against the dense FFN: neurons are reordered into experts, and a scale runs only some of them.

    y = b2 + sum_{e active} f_e(x), the active experts being the first n of the block (n and K
    depend on the scale) and the K best of the others by the router's score.

    Attributes:
        permutation: [H] int64, the dense model's index of every neuron.

    With gradients enabled inactive experts are multiplied by zero (static shapes); without, they are not computed
    wherever that is faster (``kernels.expert_ffn.pick_backend``).
    """

    permutation: Tensor

    def __init__(self, config: TransformerConfig, plans: Mapping[str, SparsityPlan], plan: str, block: int) -> None:
        super().__init__()
        chosen = plans[plan]
        self.config, self.block, self.plans = config, block, dict(plans)
        self.experts = chosen.experts
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.register_buffer("permutation", torch.arange(config.hidden))
        self.scored = max(each.router_experts(block) for each in plans.values())
        self.router = Router(config.width, self.scored) if self.scored else None
        self.plan = chosen
        self._derived = DerivedWeights()

    def weights(self) -> ExpertWeights:
        """Weights of the FFN in expert order.

        On a CPU ways that need them otherwise laid out keep that; CUDA graphs read the weights where they are.
        """
        w2 = self.fc2.weight
        plain = w2.device.type != "cpu" or torch.is_autocast_enabled("cpu") or watched()
        derived = None if plain else self._derived
        return ExpertWeights(self.fc1.weight, self.fc1.bias, w2, self.fc2.bias, self.experts, derived)

    def scores(self, x_BLC: Tensor, scale: int) -> Tensor:
        """The router's scores [B, L, E - n] of the experts after the prefix, for tokens of one scale."""
        assert self.router is not None
        free, known = self.experts - self.plan.blocks[self.block].prefix[scale], self.plan.router_experts(self.block)
        score: Tensor = self.router(x_BLC, known)[..., known - free :]
        return score

    def route(self, x_BLC: Tensor, scale: int) -> Tensor:
        """Boolean choice [B, L, E - n] among the experts after the prefix, for tokens of one scale."""
        plan = self.plan.blocks[self.block]
        if not self.plan.routes(self.block, scale):
            free = self.experts - plan.prefix[scale]
            return x_BLC.new_full((*x_BLC.shape[:2], free), plan.routed[scale] > 0, dtype=torch.bool)
        return self.select(self.scores(x_BLC, scale), scale)

    def select(self, score_BLF: Tensor, scale: int) -> Tensor:
        """Boolean choice [B, L, E - n] that the plan makes by the scores of tokens of one scale: the K largest."""
        chosen = score_BLF.topk(self.plan.blocks[self.block].routed[scale], dim=-1, sorted=False).indices
        return selection_mask(chosen, score_BLF.shape[-1])

    def forward(self, x_BLC: Tensor, span: Span) -> Tensor:
        """FFN output [B, L, C] of tokens of the scales of a span."""
        pieces = []
        for i, x in enumerate(torch.split(x_BLC, list(span.counts), dim=1)):
            if x.shape[1]:
                pieces.append(self._one_scale(x, span.first + i))
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0] if pieces else x_BLC

    def _one_scale(self, x_BLC: Tensor, scale: int) -> Tensor:
        plan = self.plan.blocks[self.block]
        if self.plan.runs_all(self.block, scale):
            return linear(linear_gelu(x_BLC, self.fc1.weight, self.fc1.bias), self.fc2.weight, self.fc2.bias)
        weights = self.weights()
        rows, prefix, routed = x_BLC.flatten(0, 1), plan.prefix[scale], plan.routed[scale]
        if routed:
            chosen = self.scores(x_BLC, scale).topk(routed, dim=-1, sorted=False).indices.flatten(0, 1)
        else:
            chosen = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        return expert_ffn(rows, weights, prefix, chosen).view_as(x_BLC)
