"""Teacher-forcing passes that keep what distillation compares: hidden states, FFN inputs and outputs.

Shapes: B pyramids, L tokens, C width, V codebook, D blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from actvar_convert.models.var import VARTransformer


@dataclass
class Trace:
    """One teacher-forcing pass.

    Attributes:
        hidden: D + 1 states [B, L, C]: before each block, and after the last.
        ffn_input, ffn_output: per block [B, L, C], when asked for.
        logits: [B, L, V] fp32; None when not asked for.
    """

    hidden: list[Tensor] = field(default_factory=list)
    ffn_input: list[Tensor] = field(default_factory=list)
    ffn_output: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None


def trace(
    transformer: VARTransformer, labels_B: Tensor, inputs_BLz: Tensor, *, ffn: bool = False, logits: bool = True
) -> Trace:
    """Runs teacher forcing and keeps the states; gradients flow as they would through ``transformer(...)``."""
    kept = Trace()
    handles = []
    if ffn:

        def keep(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept.ffn_input.append(args[0])
            kept.ffn_output.append(output)

        handles = [block.ffn.register_forward_hook(keep) for block in transformer.layers]
    try:
        x, modulation = transformer.embed(labels_B, inputs_BLz)
        span, mask = transformer.forced(x)
        kept.hidden.append(x)
        for block, block_modulation in zip(transformer.layers, modulation.blocks, strict=True):
            x = block(x, block_modulation, span, mask)
            kept.hidden.append(x)
        if logits:
            kept.logits = transformer.logits(x, modulation.head)
    finally:
        for handle in handles:
            handle.remove()
    return kept
