"""Generation written down as straightforwardly as the method reads: the baseline of the speed tables.

AdaLN's projections at every scale and block, keys and values by concatenation, an FFN of three operations,
``multinomial``, and the decoder in fp32 and the default memory layout. It uses the weights of a dense ``Model`` and
draws its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.models.base import Sampling
from actvar_convert.models.model import Model
from actvar_convert.models.sampling import filter_logits
from actvar_convert.models.var.labels import Labels
from actvar_convert.models.var.network import FFN, MAX_LOG_SCALE, VARBlock
from actvar_convert.models.var.tokenizer import VQVAE


class PlainGeneration:
    """Generates with the weights of a dense model, one chunk at a time.

    Args:
        model: dense, any device and dtype.
        tokenizer: the model's own in fp32; without it what the model has.
    """

    def __init__(self, model: Model, tokenizer: VQVAE | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer or model.tokenizer
        self.config = model.config

    @torch.inference_mode()
    def generate_tokens(self, labels: Sequence[int], *, seed: int = 0, sampling: Sampling | None = None) -> Tensor:
        """Token pyramids [B, L] int64 of one chunk of labels."""
        return torch.cat(self._tokens(labels, seed, sampling or self.model.sampling), dim=1)

    @torch.inference_mode()
    def generate(self, labels: Sequence[int], *, seed: int = 0, sampling: Sampling | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of one chunk of labels."""
        tokens = self._tokens(labels, seed, sampling or self.model.sampling)
        return self.tokenizer.decode(tokens).float().add(1).mul(0.5)

    def _tokens(self, labels: Sequence[int], seed: int, sampling: Sampling) -> list[Tensor]:
        transformer, quantizer = self.model.transformer, self.tokenizer.quantize
        pyramid, B, device = self.config.schedule, len(labels), self.model.device
        generator = torch.Generator(device).manual_seed(seed)
        label = torch.as_tensor(labels, dtype=torch.int64, device=device)
        labels_2B = torch.cat((label, torch.full_like(label, transformer.null_class)))
        prepared = transformer.prepare(Labels.of(labels_2B, transformer.null_class))
        condition = prepared.condition
        past: list[tuple[Tensor, Tensor] | None] = [None] * self.config.depth
        x, C = transformer.next_states(prepared, None, 0, pyramid), self.config.width
        f_hat: Tensor | float = 0.0
        tokens = []
        for scale in range(pyramid.num_scales):
            shared = None
            if self.config.shared_adaln:
                shared = transformer.shared_ada_lin(condition).view(-1, 6, C)
            for index, block in enumerate(transformer.blocks):
                own = block.ada_lin(condition).view(-1, 6, C) if shared is None else shared + block.ada_gss[0]
                x, past[index] = self._block(block, x, own, past[index])
            head = transformer.head_nm.ada_lin(condition).view(-1, 2, self.config.width)
            normed = transformer.head_nm(x, head).to(transformer.head.weight.dtype)
            logits = F.linear(normed, transformer.head.weight, transformer.head.bias).float()
            strength = sampling.cfg * scale / max(1, pyramid.num_scales - 1)
            logits = (1 + strength) * logits[:B] - strength * logits[B:]
            probability = filter_logits(logits, sampling.top_k, sampling.top_p).softmax(-1).flatten(0, 1)
            tokens.append(torch.multinomial(probability, 1, replacement=True, generator=generator).view(B, -1))
            if scale + 1 < pyramid.num_scales:
                f_hat = f_hat + quantizer.contribution(scale, tokens[-1])
                following = quantizer.next_input(f_hat, scale + 1).to(self.model.dtype)
                x = transformer.next_states(prepared, following, scale + 1, pyramid)
        return tokens

    def _block(
        self, block: VARBlock, x_BLC: Tensor, modulation_B6C: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_B6C.unsqueeze(2).unbind(1)
        attention, ffn = block.attn, cast(FFN, block.ffn)
        B, L, C = x_BLC.shape
        normed = F.layer_norm(x_BLC, (C,), eps=block.eps) * (1 + scale1) + shift1
        bias = torch.cat((attention.q_bias, attention.zero_k_bias, attention.v_bias))
        qkv = F.linear(normed, attention.mat_qkv.weight, bias)
        q, k, v = qkv.view(B, L, 3, attention.heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if attention.l2_norm:
            q = F.normalize(q, dim=-1) * attention.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().to(q.dtype)
            k = F.normalize(k, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale).transpose(1, 2).reshape(B, L, C)
        x_BLC = x_BLC + F.linear(out, attention.proj.weight, attention.proj.bias) * gate1
        normed = F.layer_norm(x_BLC, (C,), eps=block.eps) * (1 + scale2) + shift2
        hidden = F.gelu(F.linear(normed, ffn.fc1.weight, ffn.fc1.bias), approximate="tanh")
        return x_BLC + F.linear(hidden, ffn.fc2.weight, ffn.fc2.bias) * gate2, (k, v)
