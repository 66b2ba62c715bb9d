"""The control: the dense teacher given the same extra training, all weights, nothing saved.

What a change of its FID shows is owed to the training and not to sparsity. Its loss is that of everybody, distance to
the teacher on the teacher's own pyramids, and begins at zero: what moves the weights at first is rounding, which Adam
scales up to full steps. With ``data.images`` the pyramids are of real images instead; the loss stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from actvar_convert.cost import macs as costs
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import Progress
from rivals.method import Built, Level, Method, joint_only, mark, sparse_from


class Control(Method):
    """Everything computed, trained as long as the others."""

    name = "control"
    idea = "the dense teacher with the same extra training"
    levels: tuple[Level, ...] = ("full",)
    fixed_cut: ClassVar[float | None] = 0.0

    def recipe(self, recipe: Recipe, cut: float, config: TransformerConfig) -> Recipe:
        return joint_only(recipe)

    def build(
        self, teacher: Model, recipe: Recipe, cut: float, progress: Progress, found: Mapping[str, Scalar] | None
    ) -> Built:
        config = teacher.config
        model = sparse_from(teacher)
        mark(model.transformer, self.name)
        return Built(model, model, costs.transformer_macs(config, None))
