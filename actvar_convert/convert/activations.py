"""Calibration: what the dense model's blocks see and do on real token pyramids, one block at a time.

Only the block in hand is recorded, so memory does not grow with depth.
Shapes: P pyramids, L tokens, C width, S scales, T sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from actvar_convert.models.model import VARModel
from actvar_convert.models.var import Block, Span

NULL_SHARE = 0.25
"""Share of calibration pyramids that carry the null class: guidance runs every image with and without its class."""


@dataclass
class BlockRecord:
    """What one dense block did on the calibration pyramids.

    Attributes:
        index: of the block.
        before, after: hidden states [P, L, C] at its input and output.
        ffn_input: per scale, FFN inputs [T_s, C] of randomly chosen tokens.
    """

    index: int
    before: Tensor
    after: Tensor
    ffn_input: list[Tensor]


@torch.no_grad()
def record_blocks(
    model: VARModel, tokens_PL: Tensor, labels_P: Tensor, *, batch: int, tokens_per_scale: int, seed: int
) -> Iterator[tuple[Block, BlockRecord]]:
    """Runs the pyramids through the dense transformer block by block and yields what each block did.

    Args:
        model: dense model, any device; records stay on its device.
        tokens_PL: calibration pyramids, int64.
        labels_P: their classes; every fourth is replaced by the null class.
        batch: pyramids per forward pass.
        tokens_per_scale: FFN inputs kept per scale.
        seed: of the choice of tokens.
    """
    transformer, quantizer = model.transformer, model.tokenizer.quantize
    pyramid = transformer.config.pyramid
    labels = labels_P.to(model.device).clone()
    labels[:: round(1 / NULL_SHARE)] = transformer.null_class
    parts = list(zip(tokens_PL.to(model.device).split(batch), labels.split(batch), strict=True))
    embedded = [
        transformer.embed(label, quantizer.teacher_forcing_input(tokens.split(list(pyramid.lengths), 1)))
        for tokens, label in parts
    ]
    states = [x for x, _ in embedded]
    modulations = [modulation for _, modulation in embedded]
    span = Span(0, pyramid.lengths)
    mask = transformer.attn_bias_for_masking.to(states[0].dtype)
    generator = torch.Generator().manual_seed(seed)
    choice = [
        torch.randperm(len(tokens_PL) * length, generator=generator)[:tokens_per_scale].to(model.device)
        for length in pyramid.lengths
    ]
    for index, block in enumerate(transformer.blocks):
        inputs: list[Tensor] = []
        handle = block.ffn.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
        try:
            after = [block(x, m.blocks[index], span, mask) for x, m in zip(states, modulations, strict=True)]
        finally:
            handle.remove()
        flat = torch.cat(inputs)
        chosen = [
            flat[:, pyramid.slice(scale)].reshape(-1, flat.shape[-1])[choice[scale]]
            for scale in range(pyramid.num_scales)
        ]
        yield block, BlockRecord(index, torch.cat(states), torch.cat(after), chosen)
        states = after
