"""Self-attention over a token pyramid, with parameter names of the reference, and the cache of generation.

Shapes: B images, L tokens in hand, T tokens of context, C width, H heads, d head dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.kernels.linear import linear
from actvar_convert.models.config import TransformerConfig

MAX_LOG_SCALE = math.log(100)


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

    def append(self, block: int, k_BHLd: Tensor, v_BHLd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values [B, H, L, d] of one block; returns all of them, [B, H, T, d] each."""
        begin = self.filled[block]
        end = begin + k_BHLd.shape[2]
        self.keys[block, :, :, begin:end] = k_BHLd
        self.values[block, :, :, begin:end] = v_BHLd
        self.filled[block] = end
        return self.keys[block, :, :, :end], self.values[block, :, :, :end]


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

    def _heads(self, x_BLC: Tensor) -> Tensor:
        B, L, _ = x_BLC.shape
        return x_BLC.view(B, L, self.heads, self.head_dim).transpose(1, 2)

    def _normalise_query(self, q_BHLd: Tensor) -> Tensor:
        if not self.l2_norm:
            return q_BHLd
        scale = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        return F.normalize(q_BHLd, dim=-1).mul(scale).to(q_BHLd.dtype)

    def _normalise_key(self, k_BHLd: Tensor) -> Tensor:
        return F.normalize(k_BHLd, dim=-1).to(k_BHLd.dtype) if self.l2_norm else k_BHLd

    def query(self, x_BLC: Tensor) -> Tensor:
        """Queries [B, H, L, d] of hidden states [B, L, C]."""
        C = x_BLC.shape[-1]
        return self._normalise_query(self._heads(linear(x_BLC, self.mat_qkv.weight[:C], self.q_bias)))

    def key_value(self, x_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, d] of hidden states [B, L, C]."""
        C = x_BLC.shape[-1]
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        k, v = linear(x_BLC, self.mat_qkv.weight[C:], bias).chunk(2, dim=-1)
        return self._normalise_key(self._heads(k)), self._heads(v)

    def query_key_value(self, x_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, L, d] of hidden states [B, L, C] in one product."""
        B, L, _ = x_BLC.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = linear(x_BLC, self.mat_qkv.weight, bias).view(B, L, 3 * self.heads, self.head_dim)
        qk, v = torch.split(qkv, [2 * self.heads, self.heads], dim=2)
        if self.l2_norm:
            factor = self._query_key_scale() / torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp_min(1e-12)
            qk = qk * factor.to(qk.dtype) if torch.is_grad_enabled() else qk.mul_(factor.to(qk.dtype))
        q, k = qk.chunk(2, dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _query_key_scale(self) -> Tensor:
        """Length [2 H, 1] that normalised queries (learnt) and keys (1) get."""
        scale = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().view(self.heads, 1)
        return torch.cat((scale, torch.ones_like(scale)))

    def attend(self, q_BHLd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, mask_LT: Tensor | None) -> Tensor:
        """Attention output [B, L, C]; ``mask_LT`` is boolean (True: attends) or an additive bias, None: all attend."""
        out = F.scaled_dot_product_attention(q_BHLd, k_BHTd, v_BHTd, attn_mask=mask_LT, scale=self.scale)
        B, _, L, _ = out.shape
        joined = out.transpose(1, 2).reshape(B, L, self.heads * self.head_dim)
        return linear(joined, self.proj.weight, self.proj.bias)
