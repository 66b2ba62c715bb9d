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
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from actvar_convert.cost import macs as costs
from actvar_convert.files.run_state import Scalar
from actvar_convert.models.base import Span
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.network import GenerationCache, Modulation, VARTransformer
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import Progress
from rivals.method import Built, Level, Method, first_late_scale, joint_only, logits_alone, mark, mildest


class SideBySide(nn.Module):
    """Class embeddings of both transformers, [B, C + c]."""

    def __init__(self, large: nn.Embedding, small: nn.Embedding) -> None:
        super().__init__()
        self.large, self.small = large, small

    def forward(self, labels_B: Tensor) -> Tensor:
        return torch.cat((self.large(labels_B), self.small(labels_B)), dim=-1)


class SmallCaches:
    """The small model's keys and values of every generation under way, found by the cache of the teacher's."""

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config
        self._own: WeakKeyDictionary[GenerationCache, GenerationCache] = WeakKeyDictionary()

    def beside(self, cache: GenerationCache) -> GenerationCache:
        if cache not in self._own:
            keys = cache.keys
            self._own[cache] = GenerationCache(self._config, keys.shape[1], keys.device, keys.dtype)
        return self._own[cache]


class DraftBlock(nn.Module):
    """A block of the teacher, which runs at the drafted scales alone."""

    def __init__(self, block: Block, first: int) -> None:
        super().__init__()
        self.block, self.first = block, first

    def forward(
        self, x_BLC: Tensor, modulation_B6C: Tensor, span: Span, *, cache: GenerationCache | None = None
    ) -> Tensor:
        if span.first >= self.first:
            return x_BLC
        width = self.block.width
        return torch.cat((self.block(x_BLC[..., :width], modulation_B6C, span, cache=cache), x_BLC[..., width:]), -1)


class SmallBlock(nn.Module):
    """A block of the small model, which runs at all scales."""

    def __init__(self, block: Block, caches: SmallCaches) -> None:
        super().__init__()
        self.block, self.caches = block, caches

    def forward(
        self, x_BLC: Tensor, modulation_B6C: Tensor, span: Span, *, cache: GenerationCache | None = None
    ) -> Tensor:
        width = self.block.width
        own = None if cache is None else self.caches.beside(cache)
        small = self.block(x_BLC[..., -width:], modulation_B6C, span, cache=own)
        return torch.cat((x_BLC[..., :-width], small), -1)


class DraftedTransformer(VARTransformer):
    """Two transformers as one: hidden states, class embeddings and modulation of both, side by side.

    The teacher's blocks run at the scales before ``first``, the small one's at all, and the head is that of whoever
    speaks at a scale.
    """

    def __init__(self, large: VARTransformer, small: VARTransformer, first: int) -> None:
        nn.Module.__init__(self)
        self.config, self.first = large.config, first
        self.large, self.small = large, small
        self.pos_start = large.pos_start
        self.class_emb = cast(nn.Embedding, SideBySide(large.class_emb, small.class_emb))
        caches = SmallCaches(small.config)
        drafting = [DraftBlock(block, first) for block in large.layers]
        self.blocks = nn.ModuleList([*drafting, *(SmallBlock(block, caches) for block in small.layers)])
        mark(self, SmallModel.name, first=first)

    def modulation(self, condition_BD: Tensor) -> Modulation:
        large, small = (side.modulation(part) for side, part in self._sides(condition_BD))
        return Modulation([*large.blocks, *small.blocks], torch.cat((large.head, small.head), dim=-1))

    def positions(self, begin: int, end: int) -> Tensor:
        return torch.cat((self.large.positions(begin, end), self.small.positions(begin, end)), dim=-1)

    def first_tokens(self, condition_BD: Tensor) -> Tensor:
        return torch.cat([side.first_tokens(part) for side, part in self._sides(condition_BD)], dim=-1)

    def next_tokens(self, input_BLz: Tensor, scale: int, positions_1LC: Tensor | None = None) -> Tensor:
        small = self.small.next_tokens(input_BLz, scale)
        if scale < self.first:
            large = self.large.next_tokens(input_BLz, scale)
        else:
            large = small.new_zeros(*small.shape[:2], self.config.width)
        return torch.cat((large, small), dim=-1)

    def logits(self, x_BLC: Tensor, head_B2C: Tensor) -> Tensor:
        """Logits of one whole scale, which its number of tokens tells."""
        scale = self.config.schedule.lengths.index(x_BLC.shape[1])
        (large, x), (small, y) = self._sides(x_BLC)
        (_, head), (_, own) = self._sides(head_B2C)
        return large.logits(x, head) if scale < self.first else small.logits(y, own)

    def forward(self, labels_B: Tensor, inputs_BLz: Tensor) -> Tensor:
        """Teacher forcing; see ``VARTransformer.forward``."""
        draft = self.config.schedule.lengths[: self.first]
        drafted = sum(draft)
        x, modulation = self.large.embed(labels_B, inputs_BLz)
        mask = self.large.attn_bias_for_masking[..., :drafted, :drafted].to(x.dtype)
        x = x[:, :drafted]
        for block, own in zip(self.large.layers, modulation.blocks, strict=True):
            x = block(x, own, Span(0, draft), mask)
        late = self.small(labels_B, inputs_BLz)[:, drafted:]
        return torch.cat((self.large.logits(x, modulation.head), late), dim=1)

    def _sides(self, both: Tensor) -> list[tuple[VARTransformer, Tensor]]:
        """Each transformer with its part of the last dimension."""
        widths = [self.large.config.width, self.small.config.width]
        return list(zip((self.large, self.small), torch.split(both, widths, dim=-1), strict=True))


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
        small = SparseVARTransformer(shape, {"dense": SparsityPlan.dense(shape)}, "dense")
        small.initialise(torch.Generator().manual_seed(recipe.seed))
        small.to(device=teacher.device, dtype=teacher.dtype).requires_grad_(False)
        large = copy.deepcopy(teacher.transformer)
        model = Model(DraftedTransformer(large, small, first), teacher.tokenizer, teacher.sampling).eval()
        student = Model(small, teacher.tokenizer, teacher.sampling).eval()
        late = torch.ones(config.schedule.total)
        late[: config.schedule.begins[first]] = 0.0
        return Built(model, student, self.macs(config, shape, first), joint=logits_alone(late))


def _macs(config: TransformerConfig, run: range, speaks: range) -> int:
    """MACs per image of a transformer whose blocks run at some scales and whose head at some of these."""
    dense = SparsityPlan.dense(config)
    parts = costs.family_costs(config)
    row = [parts.image(), *[parts.block_once()] * config.depth, *(parts.scale(scale) for scale in speaks)]
    row += [costs.block_macs(config, dense, b, s) for b in range(config.depth) for s in run]
    once = costs.added(parts.once(scale) for scale in run)
    return costs.rows(True) * sum(costs.added(row).values()) + sum(once.values())
