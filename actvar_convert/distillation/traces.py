"""Teacher-forcing passes that keep what distillation compares: hidden states, FFN inputs and outputs.

Shapes: B pyramids, L tokens, z channels of an input, C width, V logits of a token, D blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from actvar_convert.models.base import walk
from actvar_convert.models.model import Model


@dataclass
class Trace:
    """One teacher-forcing pass.

    Attributes:
        hidden: D + 1 states [B, L, C]: before each block, and after the last.
        ffn_input, ffn_output: per block [B, L, C], if they were asked for.
        logits: [B, L, V] fp32; None if they were not asked for.
    """

    hidden: list[Tensor] = field(default_factory=list)
    ffn_input: list[Tensor] = field(default_factory=list)
    ffn_output: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None


def trace(model: Model, condition: Any, inputs_BLz: Tensor, *, ffn: bool = False, logits: bool = True) -> Trace:
    """Runs teacher forcing and keeps the states; gradients flow as they would through ``model.transformer(...)``."""
    x, prepared, call = model.start(condition, inputs_BLz)
    kept, states = Trace([x]), [x]
    for _, passing in walk(model.transformer.blocks, states, [prepared], call, observe=ffn):
        for passed in passing:
            kept.hidden.append(passed.after)
            if passed.ffn_input is not None and passed.ffn_output is not None:
                kept.ffn_input.append(passed.ffn_input)
                kept.ffn_output.append(passed.ffn_output)
    if logits:
        kept.logits = model.transformer.logits(states[0], prepared)
    return kept
