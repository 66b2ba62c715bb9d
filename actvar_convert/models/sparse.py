"""The sparse VAR: the dense transformer with its FFNs split into experts and gates in front of its blocks.

Shapes: B rows, L tokens in hand, K kept tokens, C width, S scales.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from actvar_convert.errors import InputError, RecipeError
from actvar_convert.kernels.token_gate import merge, take
from actvar_convert.models.attention import GenerationCache
from actvar_convert.models.config import TransformerConfig
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.gate import Reconstruction, TokenChoice, TokenGate, upsample_update
from actvar_convert.models.model import Sampling, VARModel
from actvar_convert.models.var import Block, Span, VARTransformer
from actvar_convert.models.vqvae import VQVAE
from actvar_convert.plan import SparsityPlan


class SparseBlock(Block):
    """What changes against the dense block: an ExpertFFN, and at gated scales only the kept tokens are computed.

        kept      y = block(x) of the kept tokens alone, which are all that keys and values are computed of
        skipped   y = x + reconstruction

    Attributes:
        straight_through: whether kept tokens carry a gradient to their score, as if they were mixed with their own
            reconstruction; the value stays that of the hard choice.
    """

    ffn: ExpertFFN

    def __init__(self, config: TransformerConfig, plans: Mapping[str, SparsityPlan], plan: str, index: int) -> None:
        super().__init__(config, index)
        self.config = config
        self.ffn = ExpertFFN(config, plans, plan, index)
        self.gate: TokenGate | None = None
        self.reconstruction: Reconstruction | None = None
        gating = [each for each in plans.values() if each.block_gated(index)]
        if gating:
            self.gate = TokenGate(config.width)
            rank = gating[0].reconstruction_rank
            self.reconstruction = Reconstruction(config.width, config.pyramid.num_scales, rank)
        self.plan = plans[plan]
        self.straight_through = False

    def kept_counts(self, span: Span) -> tuple[int, ...]:
        """Tokens that the block computes at each scale of the span."""
        plan = self.plan.blocks[self.index]
        return tuple(plan.kept(span.first + i, length) for i, length in enumerate(span.counts))

    def _reconstructs(self, scale: int) -> bool:
        """Whether tokens are skipped at a scale, so that the update of the one before is needed."""
        keep = self.plan.blocks[self.index].keep
        return scale < len(keep) and keep[scale] < 1

    def forward(
        self,
        x_BLC: Tensor,
        modulation_B6C: Tensor,
        span: Span,
        mask_LL: Tensor | None = None,
        cache: GenerationCache | None = None,
    ) -> Tensor:
        kept = self.kept_counts(span)
        if kept == span.counts:
            y = super().forward(x_BLC, modulation_B6C, span, mask_LL, cache)
        else:
            y = self._gated(x_BLC, modulation_B6C, span, kept, mask_LL, cache)
        if cache is not None and self._reconstructs(span.first + 1):
            cache.updates[self.index] = y - x_BLC
        return y

    def _gated(
        self,
        x_BLC: Tensor,
        modulation_B6C: Tensor,
        span: Span,
        kept: tuple[int, ...],
        mask_LL: Tensor | None,
        cache: GenerationCache | None,
    ) -> Tensor:
        assert self.gate is not None and self.reconstruction is not None
        pieces = torch.split(x_BLC, list(span.counts), dim=1)
        choices = self._choices(x_BLC, span)
        rows = _rows(choices, span)
        computed = self._compute(x_BLC, rows, modulation_B6C, span, kept, choices, mask_LL, cache)
        update = cache.updates[self.index] if cache is not None else None
        outputs = []
        for i, (x, y, choice) in enumerate(zip(pieces, torch.split(computed, list(kept), dim=1), choices, strict=True)):
            scale = span.first + i
            if kept[i] < span.counts[i]:
                sides = self.config.sides
                up = upsample_update(update, sides[scale - 1], sides[scale]) if scale else None
                if self.straight_through and torch.is_grad_enabled():
                    own = self._reconstruct(x, up, choice.kept, scale)
                    probability = torch.sigmoid(choice.score.gather(1, choice.kept)).unsqueeze(-1)
                    y = y + (probability - probability.detach()) * (y - own).detach()
                y = merge(y, self._reconstruct(x, up, choice.skipped, scale), choice.kept, choice.skipped)
            outputs.append(y)
            update = y - x
        return torch.cat(outputs, dim=1)

    def computed_rows(self, x_BLC: Tensor, span: Span) -> Tensor:
        """Which of the tokens in hand the block computes, [B, K] int64."""
        return _rows(self._choices(x_BLC, span), span)

    def _choices(self, x_BLC: Tensor, span: Span) -> list[TokenChoice]:
        """Which tokens of every scale of the span are computed."""
        pieces = torch.split(x_BLC, list(span.counts), dim=1)
        return [self._choose(x, count) for x, count in zip(pieces, self.kept_counts(span), strict=True)]

    def _choose(self, x_BLC: Tensor, count: int) -> TokenChoice:
        B, L, _ = x_BLC.shape
        if count < L:
            assert self.gate is not None
            return self.gate.choose(x_BLC, count)
        everything = torch.arange(L, device=x_BLC.device).expand(B, -1)
        return TokenChoice(everything, everything[:, :0], x_BLC.new_zeros(B, L))

    def _reconstruct(self, x_BLC: Tensor, up_BLC: Tensor | None, position_BM: Tensor, scale: int) -> Tensor:
        assert self.reconstruction is not None
        up = None if up_BLC is None else self._take(up_BLC, position_BM)
        out: Tensor = self.reconstruction(self._take(x_BLC, position_BM), up, scale)
        return out

    def _take(self, x_BLC: Tensor, position_BK: Tensor) -> Tensor:
        """``take`` as a method, so that ``report.components`` can tell what moving tokens costs."""
        return take(x_BLC, position_BK)

    def _compute(
        self,
        x_BLC: Tensor,
        row_BK: Tensor,
        modulation_B6C: Tensor,
        span: Span,
        kept: tuple[int, ...],
        choices: list[TokenChoice],
        mask_LL: Tensor | None,
        cache: GenerationCache | None,
    ) -> Tensor:
        """Attention and FFN of the kept tokens, [B, K, C]."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_B6C.unbind(1)
        constants = self.attn.constants() if cache is None else cache.constants(self.index, self.attn)
        x = self._take(x_BLC, row_BK)
        q, k, v = self.attn.query_key_value(self.norm(x, scale1, shift1), constants)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
            mask = None
        else:
            mask = None if mask_LL is None else self._mask(kept, x.device)
        if x.shape[1] == 0:
            return x
        x = torch.addcmul(x, self.attn.attend(q, k, v, mask), gate1.unsqueeze(1))
        out = self.ffn(self.norm(x, scale2, shift2), Span(span.first, kept))
        return torch.addcmul(x, out, gate2.unsqueeze(1))

    @staticmethod
    def _mask(kept: tuple[int, ...], device: torch.device) -> Tensor:
        """Boolean [K, K]: every kept token attends to those of its own scale and of the coarser ones."""
        level = torch.cat([torch.full((count,), scale, device=device) for scale, count in enumerate(kept)])
        return level.unsqueeze(1) >= level.unsqueeze(0)


def _rows(choices: list[TokenChoice], span: Span) -> Tensor:
    """Kept tokens [B, K] of all scales of a span, counted from its first token."""
    begins = accumulate(span.counts, initial=0)
    return torch.cat([choice.kept + begin for choice, begin in zip(choices, begins, strict=False)], dim=1)


class SparseVARTransformer(VARTransformer):
    """A VAR transformer that executes one of its sparsity plans.

    Args:
        config: shape of the dense transformer.
        plans: named plans; routers and gates are sized for all of them together. They share the number of experts
            and what becomes of guidance, those that gate the rank of the reconstruction.
        default: name of the active plan.

    Raises:
        RecipeError: a plan does not fit the model, or the plans do not fit each other.
    """

    def __init__(self, config: TransformerConfig, plans: Mapping[str, SparsityPlan], default: str) -> None:
        if default not in plans:
            raise RecipeError(f"plan {default!r} is not among the plans: {', '.join(plans)}")
        problems = [f"{name}: {problem}" for name, plan in plans.items() for problem in plan.problems(config)]
        gating = {name: plan for name, plan in plans.items() if plan.gated}
        for field, concerned in (
            ("experts", plans),
            ("guidance", plans),
            ("reconstruction_rank", gating),
        ):
            values = {name: getattr(plan, field) for name, plan in concerned.items()}
            if len(set(values.values())) > 1:
                problems.append(f"plans of one model must agree on {field}, given {values}")
        if problems:
            raise RecipeError("the sparsity plans do not fit the model:", problems)
        self.plans = dict(plans)
        self.plan_name = default
        super().__init__(config)

    @property
    def plan(self) -> SparsityPlan:
        return self.plans[self.plan_name]

    @property
    def rows_per_image(self) -> int:
        return self.plan.rows

    @property
    def sparse_layers(self) -> list[SparseBlock]:
        """The blocks, first to last."""
        return [cast(SparseBlock, block) for block in self.blocks]

    def make_block(self, index: int) -> Block:
        return SparseBlock(self.config, self.plans, self.plan_name, index)

    def use_plan(self, name: str) -> None:
        """Switches to another of the model's plans; nothing is copied or retrained."""
        if name not in self.plans:
            raise InputError(f"no plan {name!r} in this model; it has {', '.join(sorted(self.plans))}")
        self.plan_name = name
        for block in self.sparse_layers:
            block.plan = block.ffn.plan = self.plans[name]


class SparseVARModel(VARModel):
    """A tokenizer with a sparse transformer; generates exactly like the dense VARModel."""

    transformer: SparseVARTransformer

    def __init__(self, transformer: SparseVARTransformer, tokenizer: VQVAE, sampling: Sampling | None = None) -> None:
        super().__init__(transformer, tokenizer, sampling)

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def plans(self) -> dict[str, SparsityPlan]:
        return self.transformer.plans

    @property
    def plan_name(self) -> str:
        return self.transformer.plan_name

    @property
    def plan(self) -> SparsityPlan:
        return self.transformer.plan

    @property
    def _plan_key(self) -> Hashable:
        return self.plan

    def use_plan(self, name: str) -> None:
        """Switches to another of the model's plans; nothing is copied or retrained."""
        self.transformer.use_plan(name)
