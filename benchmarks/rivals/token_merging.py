"""Token merging and unmerging (idea of ToMe, arXiv 2210.09461, and of its use in generators, arXiv 2303.17604).

At the late scales every block merges tokens before it computes and copies what it adds back to all of them:

    one token of every 2 x 2 square is a target; each other token finds its most similar target (cosine of the block's
    inputs); the r most similar ones are averaged into theirs;    y_t = x_t + (block(merged) - merged)[group of t]

A merged token's key counts as often as it has members, here and at all later scales: the logarithm of its size is added
to its score (ToMe's proportional attention). The share of remaining tokens is one number for all late scales and
blocks, the largest that reaches the cut; a quarter is the least, for every target remains.

Counted beyond the rules: the similarities, C MACs per pair of a target and another token. Averages, sizes and copies
are sums, gather and scatter, which nobody pays for. Attention meets merged tokens as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.cost import macs as costs
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.base import Call, Span
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.network import VARBlock
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import Progress
from rivals.method import Built, Method, first_late_scale, joint_only, mildest, sparse_from, token_plan, wrap


class Merging(NamedTuple):
    """How the L tokens of one map became K.

    Attributes:
        group: [B, L], the merged token that each token belongs to. size: [B, K], members of each merged token.
    """

    group: Tensor
    size: Tensor

    def merge(self, x_BLC: Tensor) -> Tensor:
        """Averages [B, K, C] of the groups."""
        B, K = self.size.shape
        index = self.group.unsqueeze(-1).expand_as(x_BLC)
        total = x_BLC.new_zeros(B, K, x_BLC.shape[-1]).scatter_add(1, index, x_BLC)
        return total / self.size.unsqueeze(-1).to(x_BLC.dtype)

    def unmerge(self, y_BKC: Tensor) -> Tensor:
        """[B, L, C]: every token gets what its group has."""
        return y_BKC.gather(1, self.group.unsqueeze(-1).expand(-1, -1, y_BKC.shape[-1]))


def targets(side: int) -> int:
    """Targets of a square map: the upper left token of every 2 x 2 square, those cut off at the edge included."""
    return ((side + 1) // 2) ** 2


def match_tokens(x_BLC: Tensor, side: int, count: int) -> Merging:
    """Groups the tokens of one map so that ``count`` remain, at least ``targets(side)``."""
    B, L, _ = x_BLC.shape
    device = x_BLC.device
    if count == L:
        return Merging(torch.arange(L, device=device).expand(B, -1), torch.ones(B, L, device=device))
    place = torch.arange(L, device=device)
    is_target = (place // side % 2 == 0) & (place % side % 2 == 0)
    target, source = place[is_target], place[~is_target]
    with torch.no_grad():
        unit = F.normalize(x_BLC.float(), dim=-1)
        best, partner = (unit[:, source] @ unit[:, target].transpose(1, 2)).max(-1)
        rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    alone = rank - (L - count)  # sources beyond the L - count most similar ones stay, each a group of its own
    group = torch.empty(B, L, dtype=torch.int64, device=device)
    group[:, target] = torch.arange(len(target), device=device).expand(B, -1)
    group[:, source] = torch.where(alone < 0, partner, len(target) + alone)
    size = torch.zeros(B, count, device=device).scatter_add_(1, group, torch.ones(B, L, device=device))
    return Merging(group, size)


class MergingBlock(nn.Module):
    """A block that runs on merged tokens; ``keep`` of the plan is the share that remains.

    While generating, the slot's place for the update holds the logarithms of sizes of all keys so far, [B, T].
    """

    def __init__(self, block: VARBlock, plan: BlockPlan, sides: Sequence[int]) -> None:
        super().__init__()
        self.block, self.plan, self.sides = block, plan, tuple(sides)

    def forward(self, x_BLC: Tensor, context: Tensor, call: Call) -> Tensor:
        span, slot, block = call.span, call.slot, self.block
        kept = tuple(self.plan.kept(scale, length) for scale, length in zip(span.levels, span.counts, strict=True))
        if kept == span.counts and (slot is None or slot.update is None):
            plain: Tensor = block(x_BLC, context, call)
            return plain
        gate1, gate2, scale1, scale2, shift1, shift2 = context.unbind(1)
        pieces = torch.split(x_BLC, list(span.counts), dim=1)
        sides = [self.sides[scale] for scale in span.levels]
        merging = [match_tokens(x, side, count) for x, side, count in zip(pieces, sides, kept, strict=True)]
        merged = torch.cat([each.merge(x) for each, x in zip(merging, pieces, strict=True)], dim=1)
        q, k, v = block.attn.query_key_value(block.norm(merged, scale1, shift1))
        size_BK = torch.cat([each.size for each in merging], dim=1).log()
        if slot is not None:
            before = size_BK.new_zeros(len(size_BK), slot.filled) if slot.update is None else slot.update
            slot.update = torch.cat((before, size_BK), dim=1)
            k, v = slot.append(k, v)
            bias = slot.update[:, None, None]
        else:
            bias = size_BK[:, None, None]
            seen = replace(call, span=Span(span.first, kept)).mask(x_BLC.device)
            bias = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
        y = torch.addcmul(merged, block.attn.attend(q, k, v, bias.to(q.dtype)), gate1.unsqueeze(1))
        y = torch.addcmul(y, block.ffn(block.norm(y, scale2, shift2), Span(span.first, kept)), gate2.unsqueeze(1))
        added = torch.split(y - merged, list(kept), dim=1)
        return x_BLC + torch.cat([each.unmerge(update) for each, update in zip(merging, added, strict=True)], dim=1)


def merging(teacher: Model, plan: SparsityPlan) -> Model:
    """A VAR whose blocks merge tokens."""

    def around(index: int, block: nn.Module) -> nn.Module:
        assert isinstance(block, VARBlock)
        return MergingBlock(block, plan.blocks[index], teacher.config.sides)

    return wrap(sparse_from(teacher), TokenMerging.name, around, plan=plan.model_dump(mode="json"))


class TokenMerging(Method):
    """Similar tokens are computed as one at the late scales."""

    name = "token-merging"
    idea = "similar tokens are merged before a block and unmerged after it (ToMe)"

    def recipe(self, recipe: Recipe, cut: float, config: TransformerConfig) -> Recipe:
        return joint_only(recipe)

    def macs(self, config: TransformerConfig, plan: SparsityPlan) -> int:
        """MACs of the transformer per image, with guidance: the similarities in the place of the gate's."""
        lengths, sides = config.schedule.lengths, config.sides
        row = 0
        for block in range(config.depth):
            for scale, length in enumerate(lengths):
                if plan.blocks[block].kept(scale, length) < length:
                    pairs = targets(sides[scale]) * (length - targets(sides[scale]))
                    row += pairs * config.width - costs.block_macs(config, plan, block, scale)["gate"]
        return costs.transformer_macs(config, plan) + costs.rows(True) * row

    def plan(self, config: TransformerConfig, cut: float) -> SparsityPlan:
        """The plan that merges the fewest tokens and saves the cut."""
        first = first_late_scale(config)
        largest = config.schedule.lengths[-1]
        least = max(targets(config.sides[s]) / config.schedule.lengths[s] for s in range(first, len(config.sides)))
        shares = [kept / largest for kept in range(largest, 0, -1) if kept / largest >= least - 1e-9]
        plans = [token_plan(config, first, share, spared=0) for share in shares]
        return mildest(self.name, config, cut, plans, lambda plan: self.macs(config, plan))

    def build(
        self, teacher: Model, recipe: Recipe, cut: float, progress: Progress, found: Mapping[str, Scalar] | None
    ) -> Built:
        config = teacher.config
        plan = self.plan(config, cut)
        model = merging(teacher, plan)
        return Built(model, model, self.macs(config, plan))
