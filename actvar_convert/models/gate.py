"""Token sparsity: the gate that picks the tokens a block computes, and the reconstruction of the others.

Shapes: B rows, L tokens of one scale, C width, S scales, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenChoice(NamedTuple):
    """Which tokens of one scale a block computes.

    Attributes:
        kept: positions [B, k] in the map, ascending. skipped: the others [B, L - k], ascending.
        score: gate scores [B, L].
    """

    kept: Tensor
    skipped: Tensor
    score: Tensor


class TokenGate(nn.Module):
    """Predicts how much a block would change a token, ||block(x) - x|| / ||x||, from the block's input: w x + b."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Scores [B, L]."""
        out: Tensor = self.linear(x_BLC)
        return out.squeeze(-1)

    def choose(self, x_BLC: Tensor, count: int) -> TokenChoice:
        """The ``count`` tokens of one scale with the largest predicted update, and the rest."""
        score = self(x_BLC)
        order = score.argsort(dim=1, descending=True, stable=True)
        return TokenChoice(order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values, score)


def upsample_update(update_BLC: Tensor | None, side_before: int, side: int) -> Tensor | None:
    """A block's update at the previous scale, [B, side_before**2, C], bilinearly resized to [B, side**2, C]."""
    if update_BLC is None:
        return None
    B, _, C = update_BLC.shape
    grid = update_BLC.transpose(1, 2).reshape(B, C, side_before, side_before)
    grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


class Reconstruction(nn.Module):
    """Fills in tokens that a block skips: y = x + alpha_s * up(u) + B A x.

    u is the block's update at the previous scale (reconstructed tokens included), up a bilinear resize, alpha_s a
    learnt factor per scale and channel, A and B a low-rank pair per block. At rank 0 there is no such pair.
    """

    def __init__(self, channels: int, num_scales: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = nn.Parameter(torch.zeros(num_scales, channels))
        if rank:
            self.down = nn.Linear(channels, rank, bias=False)
            self.up = nn.Linear(rank, channels, bias=False)
            nn.init.zeros_(self.up.weight)

    def forward(self, x_BMC: Tensor, up_BMC: Tensor | None, scale: int) -> Tensor:
        """Skipped tokens [B, M, C] from their input and the upsampled update at their positions (None: no earlier)."""
        y = x_BMC
        if up_BMC is not None:
            y = torch.addcmul(y, up_BMC, self.alpha[scale].to(up_BMC.dtype))
        if self.rank:
            y = y + self.up(self.down(x_BMC))
        return y
