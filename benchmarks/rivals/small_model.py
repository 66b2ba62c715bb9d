"""A small model for the late scales (idea of CoDe, arXiv 2411.17787): the teacher drafts, a narrower VAR goes on.

The teacher generates the early scales. The small model, as deep as the teacher and narrower, reads the drafted tokens
along with it and generates the late scales. Its width is the largest that reaches the cut.

Counted: the teacher's blocks, word embeddings and head at the early scales; the small model's blocks and word
embeddings at all scales, for it reads the draft, and its head at the late ones; AdaLN of both.

The small model starts from nothing, for no narrower model is at hand, so there is no row without training; its learning
rate is that of stage 1. It is trained by the KL at the late scales alone: its states are not of the teacher's width.
With equal steps it is far from trained out, which ``--small-steps`` is for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from actvar_convert.cost import macs as costs
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.base import Call, Schedule, Slot
from actvar_convert.models.families import family_of
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.labels import Labels
from actvar_convert.models.var.network import Prepared, VARBlock, VARTransformer
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import Progress
from rivals.method import Built, Level, Method, first_late_scale, joint_only, logits_alone, mark, mildest


class Both(NamedTuple):
    """What depends on the class alone, of both transformers."""

    large: Prepared
    small: Prepared


class DraftBlock(nn.Module):
    """A block of the teacher, which runs at the drafted scales alone."""

    def __init__(self, own: VARBlock, first: int) -> None:
        super().__init__()
        self.own, self.first = own, first

    def context(self, prepared: Both) -> Tensor:
        return self.own.context(prepared.large)

    def forward(self, x_BLC: Tensor, context: Tensor, call: Call) -> Tensor:
        if call.span.first >= self.first:
            return x_BLC
        width = self.own.width
        return torch.cat((self.own(x_BLC[..., :width], context, call), x_BLC[..., width:]), -1)


class SmallBlock(nn.Module):
    """A block of the small model, which runs at all scales."""

    def __init__(self, own: VARBlock) -> None:
        super().__init__()
        self.own = own

    def context(self, prepared: Both) -> Tensor:
        return self.own.context(prepared.small)

    def forward(self, x_BLC: Tensor, context: Tensor, call: Call) -> Tensor:
        width = self.own.width
        return torch.cat((x_BLC[..., :-width], self.own(x_BLC[..., -width:], context, call)), -1)


class DraftedTransformer(nn.Module):
    """Two transformers as one ``models.base.Backbone``: hidden states of both, side by side.

    The teacher's blocks run at the scales before ``first``, the small one's at all, and the head is that of whoever
    speaks at a scale.
    """

    def __init__(self, large: VARTransformer, small: VARTransformer, first: int) -> None:
        super().__init__()
        self.config, self.first = large.config, first
        self.large, self.small = large, small
        drafting = [DraftBlock(cast(VARBlock, block), first) for block in large.blocks]
        self.blocks = nn.ModuleList([*drafting, *(SmallBlock(cast(VARBlock, block)) for block in small.blocks)])
        mark(self, SmallModel.name, first=first)

    def prepare(self, condition: Labels) -> Both:
        return Both(self.large.prepare(condition), self.small.prepare(condition))

    def table(self, schedule: Schedule, begin: int, end: int) -> None:
        """Positions are learnt and part of the states."""

    def slots(self, rows: int, schedule: Schedule) -> list[Slot]:
        return [*self.large.slots(rows, schedule), *self.small.slots(rows, schedule)]

    def next_states(self, prepared: Both, input_BLz: Tensor | None, scale: int, schedule: Schedule) -> Tensor:
        small = self.small.next_states(prepared.small, input_BLz, scale, schedule)
        if scale < self.first:
            large = self.large.next_states(prepared.large, input_BLz, scale, schedule)
        else:
            large = small.new_zeros(*small.shape[:2], self.config.width)
        return torch.cat((large, small), dim=-1)

    def logits(self, x_BLC: Tensor, prepared: Both) -> Tensor:
        """Logits of one whole scale, which its number of tokens tells."""
        width = self.config.width
        if self.config.schedule.lengths.index(x_BLC.shape[1]) < self.first:
            return self.large.logits(x_BLC[..., :width], prepared.large)
        return self.small.logits(x_BLC[..., width:], prepared.small)

    def forward(self, labels: Labels | Tensor, inputs_BLz: Tensor) -> Tensor:
        """Teacher forcing; see ``VARTransformer.forward``."""
        drafted = sum(self.config.schedule.lengths[: self.first])
        begin = self.config.schedule.lengths[0]
        draft = self.large(labels, inputs_BLz[:, : drafted - begin])
        return torch.cat((draft, self.small(labels, inputs_BLz)[:, drafted:]), dim=1)


def narrowed(config: TransformerConfig, width: int) -> TransformerConfig:
    """The teacher's shape at another width, the FFN's hidden neurons in proportion."""
    hidden = config.hidden * width // config.width
    return TransformerConfig(**{**config.model_dump(), "width": width, "hidden": hidden})


class SmallModel(Method):
    """The late scales are left to a narrower model.

    Attributes:
        steps: of the small model's training; None: as many as all others have.
    """

    name = "small-model"
    idea = "the teacher drafts the early scales, a narrower VAR generates the late ones (CoDe)"
    levels: tuple[Level, ...] = ("full",)

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps

    def recipe(self, recipe: Recipe, cut: float, config: TransformerConfig) -> Recipe:
        changes = [f"distill.stage2.learning_rate={recipe.distill.stage1.learning_rate}"]
        if self.steps is not None:
            changes.append(f"distill.stage2.steps={self.steps}")
        return joint_only(recipe, changes)

    def macs(self, config: TransformerConfig, small: TransformerConfig, first: int) -> int:
        """MACs of both transformers per image, with guidance."""
        everything, late = range(config.schedule.num_scales), range(first, config.schedule.num_scales)
        return _macs(config, range(first), range(first)) + _macs(small, everything, late)

    def width(self, config: TransformerConfig, first: int, cut: float) -> int:
        """The largest width that saves the cut: a multiple of the heads, in steps of about a thirty-second."""
        step = config.heads * max(1, config.head_dim // 32)
        widths = list(range(config.width, 0, -step))
        return mildest(self.name, config, cut, widths, lambda width: self.macs(config, narrowed(config, width), first))

    def build(
        self, teacher: Model, recipe: Recipe, cut: float, progress: Progress, found: Mapping[str, Scalar] | None
    ) -> Built:
        config = teacher.config
        first = max(1, first_late_scale(config))
        shape = narrowed(config, self.width(config, first, cut))
        plans = {"dense": SparsityPlan.dense(shape)}
        student = fresh_sparse(shape, teacher.tokenizer, plans, "dense", teacher.sampling).eval()
        small = student.transformer
        small.initialise(torch.Generator().manual_seed(recipe.seed))
        small.to(device=teacher.device, dtype=teacher.dtype).requires_grad_(False)
        large = copy.deepcopy(teacher.transformer)
        model = Model(DraftedTransformer(large, small, first), teacher.tokenizer, teacher.sampling).eval()
        late = torch.ones(config.schedule.total)
        late[: config.schedule.begins[first]] = 0.0
        return Built(model, student, self.macs(config, shape, first), joint=logits_alone(late))


def _macs(config: TransformerConfig, run: range, speaks: range) -> int:
    """MACs per image of a transformer whose blocks run at some scales and whose head at some of these."""
    dense = SparsityPlan.dense(config)
    parts = family_of(config).costs(config)
    row = [parts.image(), *[parts.block_once()] * config.depth, *(parts.scale(scale) for scale in speaks)]
    row += [costs.block_macs(config, dense, b, s) for b in range(config.depth) for s in run]
    once = costs.added(parts.once(scale) for scale in run)
    return costs.rows(True) * sum(costs.added(row).values()) + sum(once.values())
