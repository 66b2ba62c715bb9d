"""Token skipping by distance to the mean token, restored from the previous scale (idea of FastVAR, arXiv 2503.23367).

At the late scales every block but the first computes the tokens that lie farthest from the mean of its input; the
others get what the block added at the scale before, resized to the map. Skipped tokens have no keys and values. The
share of kept tokens is one number for all, the largest that reaches the cut.

Counted beyond the rules: the distance to the mean costs a skipping block C MACs per token of the map, as much as a
token gate. Training also reaches a factor per scale and channel on the restored update, which starts at 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from actvar_convert.cost import macs as costs
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.gate import TokenGate
from actvar_convert.models.model import Model
from actvar_convert.models.split import gated_blocks
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import Progress
from rivals.method import Built, Method, first_late_scale, joint_only, mark, mildest, sparse_from, token_plan

SPARED = 1
"""Blocks that compute all tokens: before the first one a token has seen no other."""


class DistanceToMean(TokenGate):
    """Scores a token by its distance to the mean token of its map; nothing to learn."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Scores [B, L]."""
        size: Tensor = torch.linalg.vector_norm(x_BLC - x_BLC.mean(1, keepdim=True), dim=-1)
        return size


def skipping(teacher: Model, plan: SparsityPlan) -> Model:
    """What changes against gated blocks: the gate measures instead of predicting, and updates are restored as such."""
    model = sparse_from(teacher, plan)
    for block in gated_blocks(model.transformer):
        block.gate = DistanceToMean()
        nn.init.ones_(block.reconstruction.alpha)
    mark(model.transformer, TokenSkipping.name)
    return model


class TokenSkipping(Method):
    """Only the tokens far from the mean are computed at the late scales."""

    name = "token-skipping"
    idea = "tokens near the mean keep the previous scale's update (FastVAR)"

    def recipe(self, recipe: Recipe, cut: float, config: TransformerConfig) -> Recipe:
        return joint_only(recipe)

    def plan(self, config: TransformerConfig, cut: float) -> SparsityPlan:
        """The plan that keeps the most tokens and saves the cut; the first scale has none to be restored from."""
        first = max(1, first_late_scale(config))
        largest = config.schedule.lengths[-1]
        plans = [token_plan(config, first, kept / largest, spared=SPARED) for kept in range(largest, -1, -1)]
        return mildest(self.name, config, cut, plans, lambda plan: costs.transformer_macs(config, plan))

    def build(
        self, teacher: Model, recipe: Recipe, cut: float, progress: Progress, found: Mapping[str, Scalar] | None
    ) -> Built:
        config = teacher.config
        plan = self.plan(config, cut)
        model = skipping(teacher, plan)
        return Built(model, model, costs.transformer_macs(config, plan))
