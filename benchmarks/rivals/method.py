"""What a method of the comparison is: something that makes a cheaper model of a teacher, for a given cut of FLOPs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from actvar_convert.cost import macs as costs
from actvar_convert.distillation.losses import Total, alone, kl
from actvar_convert.distillation.stages import STAGES, Losses, Stage
from actvar_convert.errors import InputError
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.split import take_dense
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.labels import Labels
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe, StageRecipe
from actvar_convert.system.progress import Progress

CODE = "3"
"""Version of the methods and of how they are measured; a change of what a row would show changes it."""

Level = Literal["none", "stage1", "full"]
"""How far a row is trained: not at all, by stage 1 alone, by everything that its recipe asks for."""

Setting = TypeVar("Setting")


class OutOfReach(InputError):
    """A cut that a method cannot make."""


@dataclass(frozen=True)
class Built:
    """A cheaper model.

    Attributes:
        model: what is measured.
        student: what the training loop trains; its weights are those that ``model`` runs.
        macs: of the transformer per image, with guidance.
        found: what was found out while it was made and its weights do not tell, for ``Method.build`` to make it again.
        joint: what trains it end to end.
    """

    model: Model
    student: Model
    macs: int
    found: Mapping[str, Scalar] = field(default_factory=dict)
    joint: Stage = STAGES["stage2"]


class Method(ABC):
    """One way to save FLOPs.

    Attributes:
        name: in tables and on the command line. idea: one line about it.
        levels: the trainings that it is shown with.
        fixed_cut: the only cut that it knows, for a method that saves nothing; None: any.
        least: the smallest cut that it can make.
        calibrated: whether making it takes long, so that the result is worth keeping.
    """

    name: str
    idea: str
    levels: tuple[Level, ...] = ("none", "full")
    least: float = 0.0
    fixed_cut: ClassVar[float | None] = None
    calibrated: ClassVar[bool] = False

    @abstractmethod
    def recipe(self, recipe: Recipe, cut: float, config: TransformerConfig) -> Recipe:
        """The settings that it is made and trained with, from those of the comparison."""

    @abstractmethod
    def build(
        self, teacher: Model, recipe: Recipe, cut: float, progress: Progress, found: Mapping[str, Scalar] | None
    ) -> Built:
        """The model without training.

        Args:
            teacher: the dense model, left as it is.
            recipe: as ``recipe`` returned it.
            cut: share of the transformer's FLOPs to save, with guidance.
            progress: told about every long step.
            found: of an earlier result whose weights are about to be loaded into this one: shapes are all that counts.

        Raises:
            OutOfReach: the method cannot save so much.
        """


def logits_alone(weights_L: Tensor | None = None) -> Stage:
    """Stage 2 with one loss, the KL to the teacher, in which every token counts by its position's weight."""

    def objective(
        model: Model,
        teacher: Model,
        recipe: StageRecipe,
        tokens_BL: Tensor,
        condition: Labels,
        total: Total = alone,
    ) -> Losses:
        inputs = teacher.teacher_forcing_input(tokens_BL)
        with torch.no_grad():
            wanted = teacher.transformer(condition, inputs)
        weights = None if weights_L is None else weights_L.to(tokens_BL.device).expand(len(tokens_BL), -1)
        return {"kl": kl(model.alphabet, wanted, model.transformer(condition, inputs), weights, total)}

    return replace(STAGES["stage2"], objective=objective)


def joint_only(recipe: Recipe, more: Sequence[str] = ()) -> Recipe:
    """The training of a method that has nothing to do in stage 1: as many steps as both stages have, all in stage 2.

    Losses, data, batch and learning rate stay; gates of the conversion, which the method does not have, are left out.
    """
    stages = recipe.distill
    steps = stages.stage1.steps + stages.stage2.steps
    settings = ("distill.stage1.steps=0", f"distill.stage2.steps={steps}", "distill.stage2.gate=frozen")
    return load_recipe(recipe, [*settings, *more])


def sparse_from(teacher: Model, plan: SparsityPlan | None = None) -> Model:
    """A model with one plan, or one that computes everything, and the teacher's weights, copied; what the teacher lacks
    keeps its starting values."""
    config = teacher.config
    plan = plan or SparsityPlan.dense(config)
    model = fresh_sparse(config, teacher.tokenizer, {"plan": plan}, "plan", teacher.sampling)
    model.transformer.to(device=teacher.device, dtype=teacher.dtype).requires_grad_(False)
    take_dense(model.transformer, teacher.transformer.state_dict())
    return model.eval()


def wrap(model: Model, name: str, around: Callable[[int, nn.Module], nn.Module], **settings: object) -> Model:
    """The model with a module of a rival around every block, in place, marked with the rival's name and settings."""
    blocks = model.transformer.blocks
    for index, block in enumerate(blocks):
        blocks[index] = around(index, block)
    mark(model.transformer, name, **settings)
    return model


def mark(transformer: nn.Module, name: str, **settings: object) -> None:
    """Stores the settings among the weights, so that they are a part of every fingerprint of the model."""
    text = json.dumps({"name": name, "code": CODE, **settings}, sort_keys=True)
    transformer.register_buffer("rival", torch.tensor(list(text.encode()), dtype=torch.uint8))


def saved(config: TransformerConfig, macs: int) -> float:
    """Share of the dense transformer's FLOPs, with guidance, that a model of so many MACs per image saves."""
    return 1 - macs / costs.transformer_macs(config, None)


def first_late_scale(config: TransformerConfig) -> int:
    """Where rivals that save at late scales begin: the first of the last scales with three quarters of all tokens."""
    pyramid = config.schedule
    held = [sum(pyramid.lengths[scale:]) for scale in range(pyramid.num_scales)]
    return max(scale for scale, tokens in enumerate(held) if scale == 0 or tokens >= 0.75 * pyramid.total)


def mildest(
    name: str, config: TransformerConfig, cut: float, settings: Sequence[Setting], macs: Callable[[Setting], int]
) -> Setting:
    """The first of the settings, mildest first, that saves at least ``cut``.

    Raises:
        OutOfReach: none does.
    """
    reached = 0.0
    for setting in settings:
        reached = saved(config, macs(setting))
        if reached >= cut:
            return setting
    raise OutOfReach(f"{name}: a cut of {cut:.3f} is out of reach, {reached:.3f} is the most that it saves")


def token_plan(config: TransformerConfig, first: int, share: float, *, spared: int) -> SparsityPlan:
    """Whole FFNs, and ``share`` of the tokens computed from scale ``first`` on in all blocks but the first ``spared``.

    Tokens that are not computed have no keys and values.
    """
    dense = SparsityPlan.dense(config)
    keep = tuple(share if scale >= first else 1.0 for scale in range(config.schedule.num_scales))
    blocks = tuple(
        block.model_copy(update={"keep": keep}) if index >= spared else block
        for index, block in enumerate(dense.blocks)
    )
    return dense.model_copy(update={"blocks": blocks, "reconstruction_rank": 0})
