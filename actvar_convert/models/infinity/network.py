"""The Infinity transformer, with the reference's parameter names (FoundationVision/Infinity, ``infinity/models``).

The reference keeps its blocks in groups (``block_chunks.I.module.J``); here they are ``blocks.N``.

Shapes: B rows (prompts, doubled if guidance is paired), L tokens in hand, T tokens of context, N text rows of the
longest prompt, C width, Ct channels of a text row, H heads, d head dimension, D bits of a token.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from actvar_convert.kernels.linear import Linear
from actvar_convert.models.base import Call, Residual, Schedule, Slot, last_states
from actvar_convert.models.infinity.config import InfinityConfig
from actvar_convert.models.infinity.schedules import largest
from actvar_convert.models.infinity.text import TextRows
from actvar_convert.models.var.network import FFN, AdaLNBeforeHead, Embedding, Modulation, SelfAttention

ROTARY_BASE = 10000.0
_MASKS_KEPT = 8


class Text(NamedTuple):
    """What the prompts are to attention.

    Attributes:
        rows: [B, N, ...], zeros behind the end of a prompt.
        mask: boolean [B, 1, 1, N], True where there are rows; None: all prompts are equally long.
    """

    rows: Tensor
    mask: Tensor | None


class Prepared(NamedTuple):
    """What depends on the prompts alone, once per image.

    Attributes:
        condition: [B, C], the pooled prompts: the first token, and what modulates.
        shared: [B, 6, C] of the projection that all blocks share.
        head: [B, 2, C]: scale and shift before the head.
        text: [B, N, C], the source of every block's keys and values.
    """

    condition: Tensor
    shared: Tensor
    head: Tensor
    text: Text


class Context(NamedTuple):
    """What a block takes from the prompts, once per image.

    Attributes:
        modulation: gates, scales with 1 added, and shifts [B, 6, C].
        keys, values: [B, H, N, d] of cross-attention.
        mask: boolean [B, 1, 1, N], or None.
    """

    modulation: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None


def rotary_table(config: InfinityConfig, schedule: Schedule) -> Tensor:
    """Cosines, then sines [L, 2, d / 2] of every position of a schedule, fp32.

    The first half of the pairs turns by the row, the second by the column, at rates base^(-i / (d / 4)). A position is
    that of the largest published size of the same ratio: the index on its finest map, rounded.

    Raises:
        InputError: no published schedule has this ratio.
    """
    half = config.head_dim // 2
    rates = 1.0 / (ROTARY_BASE ** (torch.arange(0, half, 2, device="cpu") / half))
    tall, wide = largest(schedule)
    angles = []
    for h, w in schedule.maps:
        y = (torch.arange(h, device="cpu") * (tall / h)).round().int()
        x = (torch.arange(w, device="cpu") * (wide / w)).round().int()
        own = (torch.outer(y.float(), rates)[:, None].expand(h, w, -1), torch.outer(x.float(), rates).expand(h, w, -1))
        angles.append(torch.cat(own, -1).flatten(0, 1))
    angle = torch.cat(angles)
    return torch.stack((angle.cos(), angle.sin()), 1)


def turned(x_BHLd: Tensor, table_BL: Tensor) -> Tensor:
    """Vectors [B, H, L, d] turned by a table [1 or B, L, d] of ``rotary_table``; neighbours are a pair."""
    cos, sin = table_BL.unsqueeze(1).chunk(2, -1)
    a, b = x_BHLd.reshape(*x_BHLd.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((cos * a - sin * b, sin * a + cos * b), -1).flatten(-2)


class RotaryAttention(SelfAttention):
    """Self-attention over the scales so far with positions turned into queries and keys, scale after scale.

    No mask of all pairs is made: a scale attends to the keys up to its own end.
    """

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__(config)
        if config.flash_scale:
            self.scale_mul_1H11 = nn.Parameter(self.scale_mul_1H11.detach().transpose(1, 2).contiguous())

    def forward(self, x_BLC: Tensor, call: Call) -> Tensor:
        slot = call.slot
        if slot is not None:
            slot.constants = slot.constants or self.constants()
        q, k, v = self.query_key_value(x_BLC, None if slot is None else slot.constants)
        assert call.table is not None
        q, k = turned(q, call.table), turned(k, call.table)
        if slot is not None:
            k, v = slot.append(k, v)
            return self.attend(q, k, v, None)
        outputs, begin = [], 0
        for count in call.span.counts:
            end = begin + count
            if count:
                own = F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], scale=self.scale)
                outputs.append(own)
            begin = end
        out: Tensor = self.proj((torch.cat(outputs, 2) if outputs else q).transpose(1, 2).flatten(2))
        return out


class CrossAttention(nn.Module):
    """Attention of tokens to the text; keys have no bias.

    Args:
        width: C. source: channels of the text. heads: H.
        pool: one learnt query for each head takes the place of the tokens.
    """

    component: ClassVar = "cross_attention"
    zero_k_bias: Tensor

    def __init__(self, width: int, source: int, heads: int, pool: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.mat_q: nn.Linear | nn.Parameter
        if pool:
            self.mat_q = nn.Parameter(torch.randn(1, heads, self.head_dim) / width**0.5)
        else:
            self.mat_q = Linear(width, width)
        self.mat_kv = nn.Linear(source, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = Linear(width, width)

    def keys_values(self, text_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, d] of text [B, N, source]."""
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        both = F.linear(text_BNC, self.mat_kv.weight, bias).view(*text_BNC.shape[:2], 2, self.heads, self.head_dim)
        keys, values = both.permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x_BLC: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention output [B, L, C] of normed hidden states [B, L, C]."""
        q = cast(nn.Linear, self.mat_q)(x_BLC).view(*x_BLC.shape[:2], self.heads, self.head_dim).transpose(1, 2)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2).flatten(2))
        return out

    def pooled(self, text: Text) -> Tensor:
        """The text [B, C] as the learnt queries see it."""
        keys, values = self.keys_values(text.rows)
        q = cast(Tensor, self.mat_q).transpose(0, 1).expand(len(text.rows), -1, -1, -1)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, keys, values, text.mask).flatten(1))
        return out


class TextPool(nn.Module):
    """The prompt as one vector."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ca = CrossAttention(config.width, config.text_width, config.pool_heads, pool=True)

    def forward(self, text: Text) -> Tensor:
        return self.ca.pooled(text)


class InfinityBlock(nn.Module):
    """Self-attention, cross-attention to the text, and FFN; what the prompt modulates is the first and the last.

    x := x + gate1 * sa(norm(x) * (1 + scale1) + shift1);  x := x + ca(ca_norm(x));
    x := x + gate2 * ffn(norm(x) * (1 + scale2) + shift2)
    """

    ffn: nn.Module
    ca_gamma: nn.Parameter | None

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.width, self.eps = config.width, config.norm_eps
        self.sa = RotaryAttention(config)
        self.ca = CrossAttention(config.width, config.width, config.heads)
        self.ca_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ca_gamma = nn.Parameter(torch.ones(config.width)) if config.cross_gate else None
        self.ffn = FFN(config.width, config.hidden)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)

    def context(self, prepared: Prepared) -> Context:
        gates, scales, shifts = (prepared.shared + self.ada_gss[0]).chunk(3, dim=1)
        modulation = torch.cat((gates, 1 + scales, shifts), dim=1)
        return Context(modulation, *self.ca.keys_values(prepared.text.rows), prepared.text.mask)

    def norm(self, x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor) -> Tensor:
        """Layer norm without weights, then the modulation of the prompt; ``scale_BC`` has 1 added already."""
        normed = F.layer_norm(x_BLC, (self.width,), eps=self.eps)
        return torch.addcmul(shift_BC.unsqueeze(1), normed, scale_BC.unsqueeze(1))

    def forward(self, x_BLC: Tensor, context: Context, call: Call) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = context.modulation.unbind(1)
        x_BLC = torch.addcmul(x_BLC, self.sa(self.norm(x_BLC, scale1, shift1), call), gate1.unsqueeze(1))
        found = self.ca(self.ca_norm(x_BLC), context.keys, context.values, context.mask)
        x_BLC = x_BLC + (found if self.ca_gamma is None else found * self.ca_gamma)
        out = self.ffn(self.norm(x_BLC, scale2, shift2), call.span)
        return torch.addcmul(x_BLC, out, gate2.unsqueeze(1))

    def attend(self, x_BLC: Tensor, context: Context, call: Call) -> Tensor:
        """What self-attention adds to the hidden state, [B, L, C]."""
        gate1, _, scale1, _, shift1, _ = context.modulation.unbind(1)
        out: Tensor = self.sa(self.norm(x_BLC, scale1, shift1), call) * gate1.unsqueeze(1)
        return out

    def residuals(self, context: Context) -> list[Residual]:
        """The output projections of both attentions and of the FFN, with their gates."""
        gates, fc2 = context.modulation, cast(FFN, self.ffn).fc2
        cross = None if self.ca_gamma is None else self.ca_gamma.expand(len(gates), -1)
        return [Residual(self.sa.proj, gates[:, 0]), Residual(self.ca.proj, cross), Residual(fc2, gates[:, 1])]


class InfinityTransformer(nn.Module):
    """Next-scale prediction of bits from text: all tokens of a scale are predicted at once from the coarser ones.

    Calling it is teacher forcing: logits of every token given the true coarser scales.
    """

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        width, text = config.width, config.text_width
        self.cfg_uncond = nn.Parameter(torch.randn(config.text_length, text) / text**0.5)
        self.text_norm = nn.RMSNorm(text, eps=config.norm_eps)
        self.text_proj_for_sos = TextPool(config)
        self.text_proj_for_ca = nn.Sequential(nn.Linear(text, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) * (1 / width / 3) ** 0.5)
        self.lvl_embed = nn.Embedding(config.levels, width)
        self.word_embed = Embedding(config.bits, width)
        self.shared_ada_lin = Modulation(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(InfinityBlock(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(config)
        self.head = Linear(width, 2 * config.bits)
        self._masks: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._tables: dict[tuple[Schedule, torch.device, torch.dtype], Tensor] = {}

    def prepare(self, condition: TextRows) -> Prepared:
        """The pooled prompts and what follows from them, and the source of keys and values."""
        width, own, mask = self.config.width, self.pos_start, self._mask(condition.lengths)
        parts = [
            self.cfg_uncond[: len(rows)] if silent else rows.to(own)
            for rows, silent in zip(condition.prompts(), condition.silent, strict=True)
        ]
        text = Text(self.text_norm(pad_sequence(parts, batch_first=True)), mask)
        pooled = self.text_proj_for_sos(text)
        return Prepared(
            pooled,
            self.shared_ada_lin(pooled).view(-1, 6, width),
            self.head_nm.ada_lin(pooled).view(-1, 2, width),
            Text(self.text_proj_for_ca(text.rows), mask),
        )

    def _mask(self, lengths: tuple[int, ...]) -> Tensor | None:
        """Boolean [B, 1, 1, N], True where a prompt has rows; None: all are equally long.

        The last ones are kept, so that a CUDA graph that is recorded finds its own made.
        """
        if len(set(lengths)) < 2:
            return None
        key = (lengths, self.pos_start.device)
        if key not in self._masks:
            while len(self._masks) >= _MASKS_KEPT:
                self._masks.pop(next(iter(self._masks)))
            with torch.inference_mode(False):
                filled = torch.arange(max(lengths), device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
                self._masks[key] = filled[:, None, None].to(self.pos_start.device)
        return self._masks[key]

    def table(self, schedule: Schedule, begin: int, end: int) -> Tensor:
        """Cosines, then sines [1, L, d] of some positions; kept per schedule, device and dtype."""
        key = (schedule, self.pos_start.device, self.pos_start.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # training reads it too
                self._tables[key] = rotary_table(self.config, schedule).flatten(1).unsqueeze(0).to(*key[1:])
        return self._tables[key][:, begin:end]

    def slots(self, rows: int, schedule: Schedule) -> list[Slot]:
        """Keys and values of a whole pyramid for every block."""
        shape = (rows, self.config.heads, schedule.total, self.config.head_dim)
        return [Slot(shape, self.pos_start.device, self.pos_start.dtype) for _ in self.blocks]

    def states(self, prepared: Prepared, inputs_BLz: Tensor, schedule: Schedule) -> Tensor:
        """Teacher-forcing states [B, L, C] before the first block."""
        first = (prepared.condition.unsqueeze(1) + self.pos_start).expand(-1, schedule.lengths[0], -1)
        x = torch.cat((first, self.word_embed(inputs_BLz.to(self.word_embed.weight.dtype))), 1)
        lengths = schedule.lengths[: schedule.scales_in(x.shape[1])]
        levels = [self.lvl_embed.weight[scale].expand(length, -1) for scale, length in enumerate(lengths)]
        return x + torch.cat(levels)

    def next_states(self, prepared: Prepared, input_BLz: Tensor | None, scale: int, schedule: Schedule) -> Tensor:
        """States [R, L_s, C] of one scale: from the prompt, or from inputs [B, L_s, z] that R / B rows share."""
        level = self.lvl_embed.weight[scale]
        if input_BLz is None:
            first = prepared.condition.unsqueeze(1) + self.pos_start + level
            return first.expand(-1, schedule.lengths[0], -1)
        out: Tensor = self.word_embed(input_BLz.to(self.word_embed.weight.dtype)) + level
        return out.repeat(len(prepared.condition) // len(input_BLz), 1, 1)

    def before_head(self, x_BLC: Tensor, prepared: Prepared) -> Tensor:
        """The head's input [B, L, C], in the dtype of its weights."""
        out: Tensor = self.head_nm(x_BLC, prepared.head)
        return out.to(self.head.weight.dtype)

    def logits(self, x_BLC: Tensor, prepared: Prepared) -> Tensor:
        """Logits [B, L, 2 D] in fp32 of hidden states [B, L, C]: a pair (0, 1) for every bit."""
        out: Tensor = self.head(self.before_head(x_BLC, prepared))
        return out.float()

    def forward(self, rows: TextRows, inputs_BLz: Tensor) -> Tensor:
        """Teacher forcing.

        Args:
            rows: B prompts, on the model's device.
            inputs_BLz: inputs [B, L - 1, D] made by ``Model.teacher_forcing_input``, or those of the first scales.

        Returns:
            logits [B, L, 2 D], fp32.
        """
        prepared, schedule = self.prepare(rows), self.config.schedule
        x = self.states(prepared, inputs_BLz, schedule)
        call = Call(schedule.span(schedule.scales_in(x.shape[1])), self.table(schedule, 0, x.shape[1]))
        return self.logits(last_states(self.blocks, x, prepared, call), prepared)
