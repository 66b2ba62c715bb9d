"""Self-attention over a token pyramid, with parameter names of the reference, and the cache of generation.

Shapes: B images, L tokens in hand, T tokens of context, C width, H heads, d head dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.kernels.linear import linear
from actvar_convert.models.config import TransformerConfig

MAX_LOG_SCALE = math.log(100)


class AttentionConstants(NamedTuple):
    """What attention derives from its weights alone, so that generation does it once and not at every scale.

    Attributes:
        bias: [3 C], of queries, keys (zero) and values.
        length: [2 H, 1], what normalised queries (learnt) and keys (1) are stretched to; None without normalisation.
    """

    bias: Tensor
    length: Tensor | None


class GenerationCache:
    """What generation carries from scale to scale: keys and values of all tokens so far, preallocated per block and
    written in place, and for token gates the update that each block made at the previous scale.

    Args:
        config: shape of the transformer.
        rows: images in the batch, doubled under guidance.
        device, dtype: of the stored tensors.
    """

    def __init__(self, config: TransformerConfig, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.depth, rows, config.heads, config.pyramid.total, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.filled = [0] * config.depth
        self.updates: list[Tensor | None] = [None] * config.depth
        self._constants: list[AttentionConstants | None] = [None] * config.depth

    def append(self, block: int, k_BHLd: Tensor, v_BHLd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values [B, H, L, d] of one block; returns all of them, [B, H, T, d] each."""
        begin = self.filled[block]
        end = begin + k_BHLd.shape[2]
        self.keys[block, :, :, begin:end] = k_BHLd
        self.values[block, :, :, begin:end] = v_BHLd
        self.filled[block] = end
        return self.keys[block, :, :, :end], self.values[block, :, :, :end]

    def constants(self, block: int, attention: SelfAttention) -> AttentionConstants:
        """The constants of one block's attention, derived at the first scale."""
        known = self._constants[block]
        if known is None:
            known = self._constants[block] = attention.constants()
        return known


class SelfAttention(nn.Module):
    """Multi-head attention; keys have no bias, queries and keys may be L2-normalised with a learnt scale per head."""

    zero_k_bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
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
        self.proj = nn.Linear(width, width)

    def _heads(self, x_BLD: Tensor) -> Tensor:
        """[B, L, h, d] of [B, L, h d]."""
        B, L, D = x_BLD.shape
        return x_BLD.view(B, L, D // self.head_dim, self.head_dim)

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
        qkv = self._heads(linear(x_BLC, self.mat_qkv.weight, bias))
        qk, v = torch.split(qkv, [2 * self.heads, self.heads], dim=2)
        if length is not None:
            qk = _stretched(qk, length)
        q, k = qk.chunk(2, dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q_BHLd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, mask_LT: Tensor | None) -> Tensor:
        """Attention output [B, L, C]; ``mask_LT`` is boolean (True: attends) or an additive bias, None: all attend."""
        out = F.scaled_dot_product_attention(q_BHLd, k_BHTd, v_BHTd, attn_mask=mask_LT, scale=self.scale)
        return self.project(out.transpose(1, 2).flatten(2))

    def project(self, x_BLC: Tensor) -> Tensor:
        """The output projection of what the heads found, side by side."""
        return linear(x_BLC, self.proj.weight, self.proj.bias)


def _stretched(x_BLhd: Tensor, length_h1: Tensor) -> Tensor:
    """Vectors [B, L, h, d] brought to the given lengths [h, 1]; in place where no gradient is wanted."""
    factor = (length_h1 / torch.linalg.vector_norm(x_BLhd, dim=-1, keepdim=True).clamp_min(1e-12)).to(x_BLhd.dtype)
    return x_BLhd * factor if torch.is_grad_enabled() else x_BLhd.mul_(factor)
