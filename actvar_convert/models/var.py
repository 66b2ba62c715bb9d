"""The dense VAR transformer, with the reference's parameter names (FoundationVision/VAR, ``models/var.py``).

Shapes: B rows (images, doubled under guidance), L tokens in hand, C width, D conditioning (= C), V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.kernels.linear import linear, linear_gelu
from actvar_convert.models.attention import GenerationCache, SelfAttention
from actvar_convert.models.config import TransformerConfig


@dataclass(frozen=True)
class Span:
    """Which tokens are in hand: ``counts[i]`` tokens of scale ``first + i``."""

    first: int
    counts: tuple[int, ...]


class Modulation(NamedTuple):
    """What adaptive layer norms need for one batch: it depends on the class alone, so once per image is enough.

    Attributes:
        blocks: per block [B, 6, C]: gates, scales and shifts of attention and FFN (gate1, gate2, 1 + scale1,
            1 + scale2, shift1, shift2).
        head: [B, 2, C]: scale and shift before the head.
    """

    blocks: list[Tensor]
    head: Tensor


class FFN(nn.Module):
    """Two linear layers around a tanh-GELU: y = b2 + W2 gelu(W1 x + b1)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLC: Tensor, span: Span) -> Tensor:
        hidden = linear_gelu(x_BLC, self.fc1.weight, self.fc1.bias)
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class SharedAdaLin(nn.Linear):
    """The modulation projection that all blocks share (VAR-d36)."""


class Block(nn.Module):
    """Attention and FFN under adaptive layer norm.

    x := x + gate1 * attn(norm(x) * (1 + scale1) + shift1);  x := x + gate2 * ffn(norm(x) * (1 + scale2) + shift2)
    """

    ffn: nn.Module

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.index, self.width, self.eps = index, config.width, config.norm_eps
        self.attn = SelfAttention(config)
        self.ffn = FFN(config.width, config.hidden)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def modulation(self, condition_BD: Tensor, shared_B6C: Tensor | None) -> Tensor:
        """Gates, scales with 1 added, and shifts [B, 6, C] of this block."""
        own = self.ada_lin(condition_BD).view(-1, 6, self.width) if shared_B6C is None else shared_B6C + self.ada_gss[0]
        gates, scales, shifts = own.chunk(3, dim=1)
        return torch.cat((gates, 1 + scales, shifts), dim=1)

    def norm(self, x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor) -> Tensor:
        """Layer norm without weights, then the modulation of the class; ``scale_BC`` has 1 added already."""
        normed = F.layer_norm(x_BLC, (self.width,), eps=self.eps)
        return torch.addcmul(shift_BC.unsqueeze(1), normed, scale_BC.unsqueeze(1))

    def forward(
        self,
        x_BLC: Tensor,
        modulation_B6C: Tensor,
        span: Span,
        mask_LL: Tensor | None = None,
        cache: GenerationCache | None = None,
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_B6C.unbind(1)
        constants = None if cache is None else cache.constants(self.index, self.attn)
        q, k, v = self.attn.query_key_value(self.norm(x_BLC, scale1, shift1), constants)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        x_BLC = torch.addcmul(x_BLC, self.attn.attend(q, k, v, mask_LL), gate1.unsqueeze(1))
        out = self.ffn(self.norm(x_BLC, scale2, shift2), span)
        if torch.is_grad_enabled() or out.dtype != x_BLC.dtype:
            return torch.addcmul(x_BLC, out, gate2.unsqueeze(1))
        return x_BLC.addcmul_(out, gate2.unsqueeze(1))


class AdaLNBeforeHead(nn.Module):
    """Adaptive layer norm in front of the classifier over the codebook."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.width, self.eps = config.width, config.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x_BLC: Tensor, modulation_B2C: Tensor) -> Tensor:
        scale, shift = modulation_B2C.unbind(1)
        normed = F.layer_norm(x_BLC.float(), (self.width,), eps=self.eps)
        return torch.addcmul(shift.unsqueeze(1).float(), normed, 1 + scale.unsqueeze(1).float())


class VARTransformer(nn.Module):
    """Next-scale prediction over token pyramids: all tokens of a scale are predicted at once from the coarser ones.

    Calling it is teacher forcing: logits of every token given the true coarser scales.
    """

    lvl_1L: Tensor
    attn_bias_for_masking: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        pyramid, width = config.pyramid, config.width
        self.word_embed = nn.Linear(config.z_channels, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, pyramid.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, pyramid.total, width))
        self.lvl_embed = nn.Embedding(pyramid.num_scales, width)
        level = torch.cat([torch.full((n,), s) for s, n in enumerate(pyramid.lengths)])
        self.register_buffer("lvl_1L", level.unsqueeze(0))
        bias = torch.where(level.unsqueeze(1) >= level.unsqueeze(0), 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", bias.view(1, 1, pyramid.total, pyramid.total))
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), SharedAdaLin(width, 6 * width))
        self.blocks = nn.ModuleList(self.make_block(index) for index in range(config.depth))
        self.head_nm = AdaLNBeforeHead(config)
        self.head = nn.Linear(width, config.vocab)

    def make_block(self, index: int) -> Block:
        """A fresh block; a sparse transformer overrides this to swap blocks."""
        return Block(self.config, index)

    @property
    def layers(self) -> list[Block]:
        """The blocks, first to last."""
        return [cast(Block, block) for block in self.blocks]

    @property
    def null_class(self) -> int:
        """Label that stands for no class (the unguided half of classifier-free guidance)."""
        return self.config.classes

    @property
    def rows_per_image(self) -> int:
        """Rows that generation runs per image: with the class and without, unless guidance is folded in."""
        return 2

    def condition(self, labels_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the blocks' modulations are made from: class embeddings [B, D], and the shared projection [B, 6, C]."""
        condition = self.class_emb(labels_B)
        return condition, self._shared_modulation(condition)

    def _shared_modulation(self, condition_BD: Tensor) -> Tensor | None:
        if not self.config.shared_adaln:
            return None
        out: Tensor = self.shared_ada_lin(condition_BD).view(-1, 6, self.config.width)
        return out

    def modulation(self, condition_BD: Tensor) -> Modulation:
        """Everything that adaptive layer norms need, from class embeddings [B, D]."""
        shared = self._shared_modulation(condition_BD)
        blocks = [block.modulation(condition_BD, shared) for block in self.layers]
        return Modulation(blocks, self.head_nm.ada_lin(condition_BD).view(-1, 2, self.config.width))

    def positions(self, begin: int, end: int) -> Tensor:
        """Sum of position and level embeddings [1, end - begin, C]."""
        out: Tensor = self.lvl_embed(self.lvl_1L[:, begin:end]) + self.pos_1LC[:, begin:end]
        return out

    def first_tokens(self, condition_BD: Tensor) -> Tensor:
        """Hidden state [B, L_0, C] of the first scale, which has no input but the class."""
        return condition_BD.unsqueeze(1) + self.pos_start + self.positions(0, self.config.pyramid.lengths[0])

    def next_tokens(self, input_BLz: Tensor, scale: int, positions_1LC: Tensor | None = None) -> Tensor:
        """Hidden state [B, L_s, C] of a later scale, from the downsampled features [B, L_s, z] accumulated so far.

        ``positions_1LC``: those of the whole pyramid, where they are at hand.
        """
        span = self.config.pyramid.slice(scale)
        added = self.positions(span.start, span.stop) if positions_1LC is None else positions_1LC[:, span]
        out: Tensor = self.word_embed(input_BLz) + added
        return out

    def logits(self, x_BLC: Tensor, head_B2C: Tensor) -> Tensor:
        """Logits [B, L, V] in fp32 of hidden states [B, L, C]."""
        h = self.head_nm(x_BLC, head_B2C)
        return linear(h.to(self.head.weight.dtype), self.head.weight, self.head.bias).float()

    def embed(self, labels_B: Tensor, inputs_BLz: Tensor) -> tuple[Tensor, Modulation]:
        """Teacher-forcing hidden states [B, L, C] before the first block, and the modulation; first scales will do."""
        condition = self.class_emb(labels_B)
        first = self.config.pyramid.lengths[0]
        start = condition.unsqueeze(1) + self.pos_start
        x = torch.cat((start.expand(-1, first, -1), self.word_embed(inputs_BLz.to(self.word_embed.weight.dtype))), 1)
        return x + self.positions(0, x.shape[1]), self.modulation(condition)

    def forced(self, x_BLC: Tensor) -> tuple[Span, Tensor]:
        """Span and additive mask of teacher-forcing states, which may end after any scale."""
        pyramid, tokens = self.config.pyramid, x_BLC.shape[1]
        span = Span(0, pyramid.lengths[: pyramid.scales_in(tokens)])
        return span, self.attn_bias_for_masking[..., :tokens, :tokens].to(x_BLC.dtype)

    def forward(self, labels_B: Tensor, inputs_BLz: Tensor) -> Tensor:
        """Teacher forcing.

        Args:
            labels_B: class indices [B], int64; ``null_class`` for no class.
            inputs_BLz: inputs [B, L - L_0, z] made by the tokenizer's ``teacher_forcing_input``, or those of the first
                scales.

        Returns:
            logits [B, L, V], fp32.
        """
        x, modulation = self.embed(labels_B, inputs_BLz)
        span, mask = self.forced(x)
        for block, block_modulation in zip(self.blocks, modulation.blocks, strict=True):
            x = block(x, block_modulation, span, mask)
        return self.logits(x, modulation.head)

    def initialise(self, generator: torch.Generator) -> None:
        """Starting weights for training from nothing: small normal weights, residual branches scaled with depth."""
        config = self.config
        std = (1 / config.width / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std, generator=generator)
        for block in self.layers:
            ffn = cast(FFN, block.ffn)
            for projection in (block.attn.proj, ffn.fc2):
                projection.weight.data.mul_((2 * config.depth) ** -0.5)
            if not config.shared_adaln:
                modulation = cast(nn.Linear, block.ada_lin[1])
                modulation.weight.data[2 * config.width :].mul_(0.5)
                modulation.weight.data[: 2 * config.width].mul_(1e-3)
                modulation.bias.data[: 2 * config.width].fill_(0.5)
        self.head.weight.data.mul_(0.02)
