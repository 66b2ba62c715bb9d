"""Early exit: late scales run fewer blocks (idea of FreqExit and SkipVAR, arXiv 2506.08908).

A token of scale s runs the first d_s blocks and goes to the head from there; d_s never rises with s, so every key that
a block asks for was computed. Depths of late scales lie at most two blocks apart; of all such depths the costliest that
reach the cut are taken.

Counted: the blocks that run, by the rules. Trained by the KL alone: after its exit a state has no counterpart among the
teacher's, and the error of hidden states would pull it towards several of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from actvar_convert.cost import macs as costs
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.base import Span
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.network import GenerationCache
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import Progress
from rivals.method import Built, Method, first_late_scale, joint_only, logits_alone, mark, mildest, sparse_from

Depths = tuple[int, ...]
"""Blocks that run at each scale, coarse to fine."""


class ExitBlock(SparseBlock):
    """What changes against the dense block: tokens from scale ``stop`` on pass through."""

    def __init__(
        self, config: TransformerConfig, plans: Mapping[str, SparsityPlan], plan: str, index: int, stop: int
    ) -> None:
        super().__init__(config, plans, plan, index)
        self.stop = stop

    def forward(
        self,
        x_BLC: Tensor,
        modulation_B6C: Tensor,
        span: Span,
        mask_LL: Tensor | None = None,
        cache: GenerationCache | None = None,
    ) -> Tensor:
        counts = span.counts[: max(0, self.stop - span.first)]
        run = sum(counts)
        if not run:
            return x_BLC
        mask = None if mask_LL is None else mask_LL[..., :run, :run]
        y = super().forward(x_BLC[:, :run], modulation_B6C, Span(span.first, counts), mask, cache)
        return y if run == x_BLC.shape[1] else torch.cat((y, x_BLC[:, run:]), dim=1)


class ExitTransformer(SparseVARTransformer):
    """A VAR that runs ``depths[s]`` blocks at scale s."""

    def __init__(self, config: TransformerConfig, depths: Depths) -> None:
        assert list(depths) == sorted(depths, reverse=True), depths
        self.depths = depths
        super().__init__(config, {"dense": SparsityPlan.dense(config)}, "dense")
        mark(self, EarlyExit.name, depths=depths)

    def make_block(self, index: int) -> Block:
        stop = sum(depth > index for depth in self.depths)
        return ExitBlock(self.config, self.plans, self.plans.name, index, stop)


def depth_choices(config: TransformerConfig, first: int) -> list[Depths]:
    """All depths that never rise from ``first`` on and lie at most two blocks apart there; at least one block runs."""
    late = config.schedule.num_scales - first
    found = []
    for least in range(1, config.depth + 1):
        for more in combinations_with_replacement((2, 1, 0), late):
            if more[-1] == 0 and least + more[0] <= config.depth:
                found.append((config.depth,) * first + tuple(least + each for each in more))
    return found


class EarlyExit(Method):
    """Late scales leave the network before its end."""

    name = "early-exit"
    idea = "late scales run the first blocks only (FreqExit, SkipVAR)"

    def recipe(self, recipe: Recipe, cut: float, config: TransformerConfig) -> Recipe:
        return joint_only(recipe)

    def macs(self, config: TransformerConfig, depths: Depths) -> int:
        """MACs of the transformer per image, with guidance."""
        dense = SparsityPlan.dense(config)
        left_out = sum(
            sum(costs.block_macs(config, dense, block, scale).values())
            for scale, depth in enumerate(depths)
            for block in range(depth, config.depth)
        )
        return costs.transformer_macs(config, None) - costs.rows(True) * left_out

    def depths(self, config: TransformerConfig, cut: float) -> Depths:
        """The costliest depths that save the cut."""
        choices = depth_choices(config, first_late_scale(config))
        choices.sort(key=lambda depths: self.macs(config, depths), reverse=True)
        return mildest(self.name, config, cut, choices, lambda depths: self.macs(config, depths))

    def build(
        self, teacher: Model, recipe: Recipe, cut: float, progress: Progress, found: Mapping[str, Scalar] | None
    ) -> Built:
        config = teacher.config
        depths = self.depths(config, cut)
        model = sparse_from(ExitTransformer(config, depths), teacher)
        return Built(model, model, self.macs(config, depths), joint=logits_alone())
