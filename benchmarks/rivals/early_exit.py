"""Early exit: late scales run fewer blocks (idea of FreqExit and SkipVAR, arXiv 2506.08908).

A token of scale s runs the first d_s blocks and goes to the head from there; d_s never rises with s, so every key that
a block asks for was computed. Depths of late scales lie at most two blocks apart; of all such depths the costliest that
reach the cut are taken.

Counted: the blocks that run, by the rules. Trained by the KL alone: after its exit a state has no counterpart among the
teacher's, and the error of hidden states would pull it towards several of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from actvar_convert.cost import macs as costs
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.base import Call, Span
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import Progress
from rivals.method import Built, Method, first_late_scale, joint_only, logits_alone, mildest, sparse_from, wrap

Depths = tuple[int, ...]
"""Blocks that run at each scale, coarse to fine."""


class ExitBlock(nn.Module):
    """A block that tokens from scale ``stop`` on pass by."""

    def __init__(self, block: nn.Module, stop: int) -> None:
        super().__init__()
        self.block, self.stop = block, stop

    def forward(self, x_BLC: Tensor, context: Tensor, call: Call) -> Tensor:
        counts = call.span.counts[: max(0, self.stop - call.span.first)]
        run = sum(counts)
        if not run:
            return x_BLC
        y: Tensor = self.block(x_BLC[:, :run], context, replace(call, span=Span(call.span.first, counts)))
        return y if run == x_BLC.shape[1] else torch.cat((y, x_BLC[:, run:]), dim=1)


def exiting(teacher: Model, depths: Depths) -> Model:
    """A VAR that runs ``depths[s]`` blocks at scale s."""
    assert list(depths) == sorted(depths, reverse=True), depths
    return wrap(
        sparse_from(teacher),
        EarlyExit.name,
        lambda index, block: ExitBlock(block, sum(depth > index for depth in depths)),
        depths=depths,
    )


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
        model = exiting(teacher, depths)
        return Built(model, model, self.macs(config, depths), joint=logits_alone())
