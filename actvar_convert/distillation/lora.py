"""Low-rank updates of linear layers: trained beside the frozen weight, folded into it at the end.

weight = W + B A, A [r, in] and B [out, r] (Hu et al., 2021, arXiv 2106.09685).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from actvar_convert.models.base import inner


class LowRankUpdate(nn.Module):
    """W to W + lora_up lora_down; starts at zero."""

    role: ClassVar = "low-rank update"

    def __init__(self, out_features: int, in_features: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        self.lora_down = nn.Parameter(start)
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_up @ self.lora_down


def lora_targets(transformer: nn.Module) -> list[nn.Linear]:
    """The layers that get a low-rank update: the matrices of every block that have no role of their own."""
    blocks = transformer.blocks
    assert isinstance(blocks, nn.ModuleList)
    found: list[nn.Linear] = []
    for block in map(inner, blocks):
        left_out = {module for each in block.modules() if hasattr(each, "role") for module in each.modules()}
        found += [each for each in block.modules() if isinstance(each, nn.Linear) and each not in left_out]
    return found


def attach_lora(transformer: nn.Module, rank: int, seed: int) -> None:
    """Adds a low-rank update to the attention and FFN matrices of every block."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_targets(transformer):
        update = LowRankUpdate(layer.out_features, layer.in_features, rank, generator)
        parametrize.register_parametrization(layer, "weight", update.to(layer.weight.device, layer.weight.dtype))


def fold_lora(transformer: nn.Module) -> None:
    """Adds the low-rank updates to the weights they belong to and removes them."""
    for layer in lora_targets(transformer):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
