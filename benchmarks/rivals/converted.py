"""Our conversion and the baselines that differ from it by a setting, the plan, or what groups neurons into experts.

Priced by ``actvar_convert.cost.macs`` as they stand. All but ``uniform-width`` get their plan by the same search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import actvar_convert as av
from actvar_convert.conversion.activations import Calibration
from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.conversion.clustering import Clustering
from actvar_convert.conversion.converter import convert_model
from actvar_convert.conversion.search import Planned, measure_sensitivity, search_plan
from actvar_convert.cost import macs as costs
from actvar_convert.errors import RecipeError
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.stores import calibration_store, require_images
from actvar_convert.system.progress import Progress
from rivals.clusterings import by_chance, by_weights
from rivals.method import Built, Level, Method, OutOfReach


@dataclass(frozen=True)
class Conversion(Method):
    """The recipe of the comparison, with its budget set to the cut and ``settings`` changed.

    Attributes:
        uniform: its plan is the same in every block and at every scale instead of searched for.
        clustering: groups neurons in place of the recipe's method.
    """

    name: str
    idea: str
    settings: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ("none", "full")
    least: float = 0.0
    uniform: bool = False
    clustering: Clustering | None = None
    calibrated: ClassVar[bool] = True

    def recipe(self, recipe: Recipe, cut: float, config: TransformerConfig) -> Recipe:
        one_plan = ("plans=null", "default_plan=null", "budget.plans={}", f"budget.reduction={cut}")
        return load_recipe(recipe, [*one_plan, *self.settings], config=config)

    def build(
        self, teacher: Model, recipe: Recipe, cut: float, progress: Progress, found: Mapping[str, Scalar] | None
    ) -> Built:
        config = teacher.config
        if cut < self.least:
            raise OutOfReach(f"{self.name}: a cut of {cut:.3f} is out of reach, it saves {self.least:.3f} at least")
        if found is None:
            try:
                plans, _ = recipe_plans(config, recipe)
            except RecipeError as error:
                raise OutOfReach(f"{self.name}: {error}") from error
            if self.clustering is not None:
                model = clustered(teacher, recipe, self.clustering, progress)
            else:
                stated = {"plans": plans} if self.uniform else {}
                model = av.convert(teacher, recipe=recipe.model_copy(update=stated), progress=progress)
        else:
            plan = SparsityPlan.model_validate_json(str(found["plan"]))
            model = fresh_sparse(config, teacher.tokenizer, {"default": plan}, "default", teacher.sampling).eval()
            model.transformer.to(device=teacher.device, dtype=teacher.dtype).requires_grad_(False)
        plan = model.plan
        return Built(model, model, costs.transformer_macs(config, plan), {"plan": plan.model_dump_json()})


def clustered(teacher: Model, recipe: Recipe, clustering: Clustering, progress: Progress) -> Model:
    """What ``actvar_convert.convert`` makes, with neurons grouped by ``clustering``."""
    images = require_images(recipe, teacher.family.classes(teacher.config), progress)
    store = calibration_store(teacher, recipe, images, progress=progress)
    calibration = Calibration(store.tokens, store.condition, recipe.calibration.batch)
    found = measure_sensitivity(teacher, recipe, calibration, clustering=clustering)
    plan, _ = search_plan(teacher.config, recipe, found, recipe.budget.reduction)
    partitions = [block.partition for block in found]
    return convert_model(teacher, Planned({"default": plan}, "default", partitions, {}), recipe, calibration)


CONVERSIONS = (
    Conversion("ours", "the recipe: experts per block and scale, token gates", (), ("none", "stage1", "full")),
    Conversion("routed", "ours with half of the active experts routed per token", ("budget.prefix_share=0.5",)),
    Conversion(
        "experts",
        "half of the active experts routed per token, no gate",
        ("budget.prefix_share=0.5", "budget.gate_keep=1.0"),
    ),
    Conversion(
        "static-width",
        "a number of experts per block and scale, the same ones for every token; no router, no gate",
        ("budget.prefix_share=1.0", "budget.gate_keep=1.0"),
    ),
    Conversion(
        "uniform-width",
        "the most important neurons, as many in every block and at every scale; no router, no gate",
        ("budget.prefix_share=1.0", "budget.gate_keep=1.0"),
        uniform=True,
    ),
    Conversion(
        "refitted",
        "ours with weights refitted block after block before the training",
        ("experts.compensation=sequential",),
    ),
    Conversion(
        "folded",
        "ours with guidance folded into the predictions, which saves half; what is asked beyond, experts and gate save",
        ("budget.guidance=folded",),
        ("full",),
        0.5,
    ),
    Conversion(
        "random-experts",
        "routed with neurons grouped by chance; where nothing is routed no group matters",
        ("budget.prefix_share=0.5",),
        clustering=by_chance,
    ),
    Conversion(
        "weight-experts",
        "routed with neurons grouped by the rows of their weights",
        ("budget.prefix_share=0.5",),
        clustering=by_weights,
    ),
)
