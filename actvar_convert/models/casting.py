"""A model in another dtype."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn

from actvar_convert.models.model import Model


def cast(model: Model, dtype: torch.dtype, *, decoder: torch.dtype = torch.float32) -> Model:
    """The model as ``load`` gives it in another dtype, tokenizer in fp32: a copy, or itself if nothing changes.

    What keeps its dtype is shared with the model, not copied. One tensor after another is converted, so the copy
    takes no more memory than it holds in the end.

    Args:
        model: left as it is.
        dtype: of the transformer.
        decoder: of the tokenizer's decoder and the convolution before it. The quantizer stays in fp32, so the tokens
            do not depend on it.
    """
    parts = [(model.transformer, dtype), *((part, decoder) for part in model.tokenizer.decoder_parts)]
    parts.append((model.tokenizer, torch.float32))
    made: dict[int, Tensor] = {}
    changed = False
    for part, of in parts:
        for tensor in chain(part.parameters(), part.buffers()):
            if id(tensor) in made:
                continue
            converted = tensor.detach().to(of) if tensor.is_floating_point() else tensor
            if converted.dtype != tensor.dtype:
                changed = True
            if isinstance(tensor, nn.Parameter):
                converted = nn.Parameter(converted, requires_grad=tensor.requires_grad)
            made[id(tensor)] = converted
    return copy.deepcopy(model, made) if changed else model
