"""Token sparsity: the gate that picks the tokens a block computes, and the reconstruction of the others.

Shapes: B rows, L tokens in hand, K kept tokens, M skipped ones, C width, S scales, r rank.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.kernels.token_gate import merge, take
from actvar_convert.models.base import Call, Schedule, Span
from actvar_convert.plan import Plans


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

    role: ClassVar = "gate"
    component: ClassVar = "gate"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Scores [B, L]."""
        out: Tensor = self.linear(x_BLC)
        return out.squeeze(-1)

    def choose(self, x_BLC: Tensor, count: int) -> TokenChoice:
        """The ``count`` tokens of one scale that come first in ``order``, and the rest."""
        score = self(x_BLC)
        order = self.order(x_BLC, score)
        return TokenChoice(order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values, score)

    def order(self, x_BLC: Tensor, score_BL: Tensor) -> Tensor:
        """The rule that picks tokens: positions [B, L] of one scale, int64, those to keep first.

        The search for a plan asks it too. It never waits for the device: CUDA graphs record it.

        Args:
            x_BLC: the block's input. score_BL: the predicted updates.
        """
        return score_BL.argsort(dim=1, descending=True, stable=True)


def upsample_update(update_BLC: Tensor | None, before: tuple[int, int], after: tuple[int, int]) -> Tensor | None:
    """A block's update at the previous scale, [B, h w, C] of a map ``before``, bilinearly resized to ``after``."""
    if update_BLC is None:
        return None
    grid = update_BLC.transpose(1, 2).reshape(len(update_BLC), -1, *before)
    grid = F.interpolate(grid, size=after, mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2)


class Reconstruction(nn.Module):
    """Fills in tokens that a block skips: y = x + alpha_s * up(u) + B A x.

    u is the block's update at the previous scale (reconstructed tokens included), up a bilinear resize, alpha_s a
    learnt factor per scale and channel, A and B a low-rank pair per block. At rank 0 there is no such pair.
    """

    role: ClassVar = "reconstruction"
    component: ClassVar = "reconstruction"

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


class GatedBlock(nn.Module):
    """Any block, computed for the tokens that its gate keeps; the others are reconstructed.

        kept      y = block(x), the kept tokens attending to kept tokens alone
        skipped   y = x + reconstruction

    Attributes:
        block: a family's own block.
        straight_through: whether kept tokens carry a gradient to their score, as if they were mixed with their own
            reconstruction; the value stays that of the hard choice.
    """

    def __init__(self, block: nn.Module, index: int, plans: Plans, schedule: Schedule, width: int, rank: int) -> None:
        super().__init__()
        self.block, self.index, self.plans, self.schedule = block, index, plans, schedule
        self.gate = TokenGate(width)
        self.reconstruction = Reconstruction(width, schedule.num_scales, rank)
        self.straight_through = False

    def kept_counts(self, span: Span) -> tuple[int, ...]:
        """Tokens that the block computes at each scale of a span of whole maps."""
        plan = self.plans.current.blocks[self.index]
        return tuple(plan.kept(scale, length) for scale, length in zip(span.levels, span.counts, strict=True))

    def computed_rows(self, x_BLC: Tensor, span: Span) -> Tensor:
        """Which of the tokens in hand the block computes, [B, K] int64."""
        return _rows(self._choices(x_BLC, span), span)

    def forward(self, x_BLC: Tensor, context: Any, call: Call) -> Tensor:
        kept = self.kept_counts(call.span)
        y: Tensor = self.block(x_BLC, context, call) if kept == call.span.counts else self._gated(x_BLC, context, call)
        if call.slot is not None and self._reconstructs(call.span.first + 1):
            call.slot.update = y - x_BLC
        return y

    def _reconstructs(self, scale: int) -> bool:
        """Whether tokens are skipped at a scale, so that the update of the one before is needed."""
        keep = self.plans.current.blocks[self.index].keep
        return scale < len(keep) and keep[scale] < 1

    def _gated(self, x_BLC: Tensor, context: Any, call: Call) -> Tensor:
        span, kept, maps = call.span, self.kept_counts(call.span), self.schedule.maps
        choices = self._choices(x_BLC, span)
        rows = _rows(choices, span)
        computed = take(x_BLC, rows)
        if rows.shape[1]:
            computed = self.block(computed, context, call.of(rows, kept))
        update = None if call.slot is None else call.slot.update
        outputs = []
        parts = zip(span.levels, _split(x_BLC, span.counts), _split(computed, kept), choices, strict=True)
        for scale, x, y, choice in parts:
            if choice.skipped.shape[1]:
                up = upsample_update(update, maps[scale - 1], maps[scale]) if scale else None
                if self.straight_through and torch.is_grad_enabled():
                    own = self._reconstruct(x, up, choice.kept, scale)
                    probability = torch.sigmoid(choice.score.gather(1, choice.kept)).unsqueeze(-1)
                    y = y + (probability - probability.detach()) * (y - own).detach()
                y = merge(y, self._reconstruct(x, up, choice.skipped, scale), choice.kept, choice.skipped)
            outputs.append(y)
            update = y - x
        return torch.cat(outputs, dim=1)

    def _choices(self, x_BLC: Tensor, span: Span) -> list[TokenChoice]:
        """Which tokens of every scale of the span are computed."""
        return [
            self._choose(x, count) for x, count in zip(_split(x_BLC, span.counts), self.kept_counts(span), strict=True)
        ]

    def _choose(self, x_BLC: Tensor, count: int) -> TokenChoice:
        B, L, _ = x_BLC.shape
        if 0 < count < L:  # else there is nothing to choose
            return self.gate.choose(x_BLC, count)
        everything = torch.arange(L, device=x_BLC.device).expand(B, -1)
        return TokenChoice(everything[:, :count], everything[:, count:], x_BLC.new_zeros(B, L))

    def _reconstruct(self, x_BLC: Tensor, up_BLC: Tensor | None, position_BM: Tensor, scale: int) -> Tensor:
        up = None if up_BLC is None else take(up_BLC, position_BM)
        out: Tensor = self.reconstruction(take(x_BLC, position_BM), up, scale)
        return out


def _split(x_BLC: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The tokens of every scale."""
    return torch.split(x_BLC, list(counts), dim=1)


def _rows(choices: list[TokenChoice], span: Span) -> Tensor:
    """Kept tokens [B, K] of all scales of a span, counted from its first token."""
    begins = accumulate(span.counts, initial=0)
    return torch.cat([choice.kept + begin for choice, begin in zip(choices, begins, strict=False)], dim=1)
