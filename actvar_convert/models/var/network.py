"""The VAR transformer, with the reference's parameter names (FoundationVision/VAR, ``models/var.py``).

Shapes: B rows (images, doubled if guidance is paired), L tokens in hand, T tokens of context, C width, H heads, d head
dimension, D conditioning (= C), V codebook size.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.kernels.linear import Linear, linear, linear_gelu
from actvar_convert.models.base import Call, Residual, Schedule, Slot, Span, last_states
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.labels import Labels

MAX_LOG_SCALE = math.log(100)


class Prepared(NamedTuple):
    """What depends on the class alone, once per image.

    Attributes:
        condition: class embeddings [B, D].
        shared: [B, 6, C] of the projection that all blocks share; None: each has its own.
        head: [B, 2, C]: scale and shift before the head.
    """

    condition: Tensor
    shared: Tensor | None
    head: Tensor


class AttentionConstants(NamedTuple):
    """What attention derives from its weights alone, so that generation does it once and not at every scale.

    Attributes:
        bias: [3 C], of queries, keys (zero) and values.
        length: [2 H, 1], what normalised queries (learnt) and keys (1) are stretched to; None without normalisation.
    """

    bias: Tensor
    length: Tensor | None


class AttentionShape(Protocol):
    """What attention and norms ask of a configuration, as ``TransformerConfig`` states it."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def l2_attention(self) -> bool: ...

    @property
    def attention_scale(self) -> float: ...

    @property
    def norm_eps(self) -> float: ...


class SelfAttention(nn.Module):
    """Multi-head attention; keys have no bias, queries and keys may be L2-normalised with a learnt scale per head."""

    component: ClassVar = "attention"
    zero_k_bias: Tensor

    def __init__(self, config: AttentionShape) -> None:
        super().__init__()
        width = config.width
        self.heads, self.head_dim = config.heads, config.head_dim
        self.scale, self.l2_norm = config.attention_scale, config.l2_attention
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = Linear(width, width)

    def constants(self) -> AttentionConstants:
        """What depends on the weights alone; generation keeps it, any other caller derives it anew, with gradients."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        if not self.l2_norm:
            return AttentionConstants(bias, None)
        scale = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().view(self.heads, 1)
        return AttentionConstants(bias, torch.cat((scale, torch.ones_like(scale))))

    def query_key_value(
        self, x_BLC: Tensor, constants: AttentionConstants | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L, d] of hidden states [B, L, C] in one product."""
        bias, length = constants or self.constants()
        B, L, _ = x_BLC.shape
        qkv = linear(x_BLC, self.mat_qkv.weight, bias).view(B, L, 3 * self.heads, self.head_dim)
        qk, v = torch.split(qkv, [2 * self.heads, self.heads], dim=2)
        if length is not None:
            qk = _stretched(qk, length)
        q, k = qk.chunk(2, dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q_BHLd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, mask_LT: Tensor | None) -> Tensor:
        """Attention output [B, L, C]; ``mask_LT`` is boolean (True: attends); None: all attend."""
        out = F.scaled_dot_product_attention(q_BHLd, k_BHTd, v_BHTd, attn_mask=mask_LT, scale=self.scale)
        found: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return found

    def forward(self, x_BLC: Tensor, call: Call) -> Tensor:
        """Attention output [B, L, C] of normed hidden states [B, L, C]."""
        slot = call.slot
        if slot is None:
            q, k, v = self.query_key_value(x_BLC)
        else:
            slot.constants = slot.constants or self.constants()
            q, k, v = self.query_key_value(x_BLC, slot.constants)
            k, v = slot.append(k, v)
        return self.attend(q, k, v, call.mask(x_BLC.device))


def _stretched(x_BLhd: Tensor, length_h1: Tensor) -> Tensor:
    """Vectors [B, L, h, d] brought to the given lengths [h, 1]; in place if no gradient is wanted."""
    factor = (length_h1 / torch.linalg.vector_norm(x_BLhd, dim=-1, keepdim=True).clamp_min(1e-12)).to(x_BLhd.dtype)
    return x_BLhd * factor if torch.is_grad_enabled() else x_BLhd.mul_(factor)


class FFN(nn.Module):
    """Two linear layers around a tanh-GELU: y = b2 + W2 gelu(W1 x + b1)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLC: Tensor, span: Span) -> Tensor:
        hidden = linear_gelu(x_BLC, self.fc1.weight, self.fc1.bias)
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class Modulation(nn.Sequential):
    """A projection of the class to gates, scales and shifts: SiLU, then a linear layer."""

    role: ClassVar = "modulation"
    component: ClassVar = "adaln"


class Embedding(nn.Linear):
    """Features of a token to a hidden state."""

    component: ClassVar = "embedding"


class VARBlock(nn.Module):
    """Attention and FFN under adaptive layer norm; the context is its modulation [B, 6, C].

    x := x + gate1 * attn(norm(x) * (1 + scale1) + shift1);  x := x + gate2 * ffn(norm(x) * (1 + scale2) + shift2)
    """

    ffn: nn.Module

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.width, self.eps = config.width, config.norm_eps
        self.attn = SelfAttention(config)
        self.ffn = FFN(config.width, config.hidden)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)
        else:
            self.ada_lin = Modulation(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def context(self, prepared: Prepared) -> Tensor:
        """Gates, scales with 1 added, and shifts [B, 6, C] of this block."""
        if prepared.shared is None:
            own = self.ada_lin(prepared.condition).view(-1, 6, self.width)
        else:
            own = prepared.shared + self.ada_gss[0]
        gates, scales, shifts = own.chunk(3, dim=1)
        return torch.cat((gates, 1 + scales, shifts), dim=1)

    def norm(self, x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor) -> Tensor:
        """Layer norm without weights, then the modulation of the class; ``scale_BC`` has 1 added already."""
        normed = F.layer_norm(x_BLC, (self.width,), eps=self.eps)
        return torch.addcmul(shift_BC.unsqueeze(1), normed, scale_BC.unsqueeze(1))

    def forward(self, x_BLC: Tensor, context: Tensor, call: Call) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = context.unbind(1)
        found = self.attn(self.norm(x_BLC, scale1, shift1), call)
        x_BLC = torch.addcmul(x_BLC, found, gate1.unsqueeze(1))
        out = self.ffn(self.norm(x_BLC, scale2, shift2), call.span)
        if torch.is_grad_enabled() or out.dtype != x_BLC.dtype:
            return torch.addcmul(x_BLC, out, gate2.unsqueeze(1))
        return x_BLC.addcmul_(out, gate2.unsqueeze(1))

    def attend(self, x_BLC: Tensor, context: Tensor, call: Call) -> Tensor:
        """What self-attention adds to the hidden state, [B, L, C]."""
        gate1, _, scale1, _, shift1, _ = context.unbind(1)
        out: Tensor = self.attn(self.norm(x_BLC, scale1, shift1), call) * gate1.unsqueeze(1)
        return out

    def residuals(self, context: Tensor) -> list[Residual]:
        """Attention's output projection and the FFN's, with their gates."""
        fc2 = cast(FFN, self.ffn).fc2
        return [Residual(self.attn.proj, context[:, 0]), Residual(fc2, context[:, 1])]


class AdaLNBeforeHead(nn.Module):
    """Adaptive layer norm in front of the classifier over the codebook."""

    def __init__(self, config: AttentionShape) -> None:
        super().__init__()
        self.width, self.eps = config.width, config.norm_eps
        self.ada_lin = Modulation(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

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
        schedule, width = config.schedule, config.width
        self.word_embed = Embedding(config.z_channels, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, schedule.lengths[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, schedule.total, width))
        self.lvl_embed = nn.Embedding(schedule.num_scales, width)
        level = torch.cat([torch.full((n,), s) for s, n in enumerate(schedule.lengths)])
        self.register_buffer("lvl_1L", level.unsqueeze(0))
        bias = torch.where(level.unsqueeze(1) >= level.unsqueeze(0), 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", bias.view(1, 1, schedule.total, schedule.total))
        if config.shared_adaln:
            self.shared_ada_lin = Modulation(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(VARBlock(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(config)
        self.head = Linear(width, config.vocab)

    @property
    def null_class(self) -> int:
        """Label that stands for no class (the unguided half of classifier-free guidance)."""
        return self.config.classes

    def prepare(self, condition: Labels) -> Prepared:
        """Class embeddings, the shared projection if there is one, and the modulation before the head."""
        embedded = self.class_emb(condition.values)
        shared = None
        if self.config.shared_adaln:
            shared = self.shared_ada_lin(embedded).view(-1, 6, self.config.width)
        return Prepared(embedded, shared, self.head_nm.ada_lin(embedded).view(-1, 2, self.config.width))

    def _positions(self, begin: int, end: int) -> Tensor:
        """Sum of position and level embeddings [1, end - begin, C]."""
        out: Tensor = self.lvl_embed(self.lvl_1L[:, begin:end]) + self.pos_1LC[:, begin:end]
        return out

    def table(self, schedule: Schedule, begin: int, end: int) -> Tensor | None:
        """Positions are learnt and part of the states."""
        return None

    def slots(self, rows: int, schedule: Schedule) -> list[Slot]:
        """Keys and values of a whole pyramid for every block."""
        shape = (rows, self.config.heads, schedule.total, self.config.head_dim)
        return [Slot(shape, self.pos_start.device, self.pos_start.dtype) for _ in self.blocks]

    def states(self, prepared: Prepared, inputs_BLz: Tensor, schedule: Schedule) -> Tensor:
        """Teacher-forcing states [B, L, C] before the first block."""
        start = prepared.condition.unsqueeze(1) + self.pos_start
        first = start.expand(-1, schedule.lengths[0], -1)
        x = torch.cat((first, self.word_embed(inputs_BLz.to(self.word_embed.weight.dtype))), 1)
        return x + self._positions(0, x.shape[1])

    def next_states(self, prepared: Prepared, input_BLz: Tensor | None, scale: int, schedule: Schedule) -> Tensor:
        """States [R, L_s, C] of one scale: from the class, or from inputs [B, L_s, z] that R / B rows share."""
        part = schedule.slice(scale)
        positions = self._positions(part.start, part.stop)
        if input_BLz is None:
            return prepared.condition.unsqueeze(1) + self.pos_start + positions
        out: Tensor = self.word_embed(input_BLz.to(self.word_embed.weight.dtype)) + positions
        return out.repeat(len(prepared.condition) // len(input_BLz), 1, 1)

    def before_head(self, x_BLC: Tensor, prepared: Prepared) -> Tensor:
        """The head's input [B, L, C], in the dtype of its weights."""
        out: Tensor = self.head_nm(x_BLC, prepared.head)
        return out.to(self.head.weight.dtype)

    def logits(self, x_BLC: Tensor, prepared: Prepared) -> Tensor:
        """Logits [B, L, V] in fp32 of hidden states [B, L, C]."""
        out: Tensor = self.head(self.before_head(x_BLC, prepared))
        return out.float()

    def forward(self, labels: Labels | Tensor, inputs_BLz: Tensor) -> Tensor:
        """Teacher forcing.

        Args:
            labels: class indices [B], int64; ``null_class`` for no class.
            inputs_BLz: inputs [B, L - L_0, z] made by ``Model.teacher_forcing_input``, or those of the first scales.

        Returns:
            logits [B, L, V], fp32.
        """
        if isinstance(labels, Tensor):
            labels = Labels.of(labels, self.null_class)
        prepared, schedule = self.prepare(labels), self.config.schedule
        x = self.states(prepared, inputs_BLz, schedule)
        call = Call(schedule.span(schedule.scales_in(x.shape[1])))
        return self.logits(last_states(self.blocks, x, prepared, call), prepared)

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
        for block in cast(list[VARBlock], list(self.blocks)):
            ffn = cast(FFN, block.ffn)
            for projection in (block.attn.proj, ffn.fc2):
                projection.weight.data.mul_((2 * config.depth) ** -0.5)
            if not config.shared_adaln:
                modulation = cast(nn.Linear, block.ada_lin[1])
                modulation.weight.data[2 * config.width :].mul_(0.5)
                modulation.weight.data[: 2 * config.width].mul_(1e-3)
                modulation.bias.data[: 2 * config.width].fill_(0.5)
        self.head.weight.data.mul_(0.02)
