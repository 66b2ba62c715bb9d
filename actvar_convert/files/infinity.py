"""What the files of an Infinity look like: names of its tensors, its shape by theirs, the published models.

Names are the reference's (FoundationVision/Infinity): blocks in groups, ``block_chunks.I.module.J``, convolutions and
norms of the tokenizer nested once more than their kind needs (``conv1.conv.weight``). Other programs leave either out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from actvar_convert.models.infinity.config import InfinityConfig

_CHUNK = re.compile(r"^block_chunks\.(?P<chunk>\d+)\.(?:module\.)?(?P<place>\d+)\.(?P<rest>.+)$")
_NESTED = re.compile(
    r"((?:^|\.)(?:conv_in|conv_out|conv1|conv2|nin_shortcut|(?:down|up)sample\.conv))\.conv\.(weight|bias)$"
)
_NESTED_NORM = re.compile(r"((?:^|\.)(?:norm1|norm2|norm_out))\.norm\.(weight|bias)$")
_PLAIN = re.compile(r"((?:^|\.)(?:conv_in|conv_out|conv1|conv2|nin_shortcut|(?:down|up)sample\.conv))\.(weight|bias)$")
_PLAIN_NORM = re.compile(r"((?:^|\.)(?:norm1|norm2|norm_out))\.(weight|bias)$")
_DERIVED = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
"""Buffers of a training that follow from its settings."""


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformer by the names that ``InfinityTransformer`` has."""
    places = [int(match["place"]) for match in map(_CHUNK.match, tensors) if match]
    size, found = max(places, default=0) + 1, {}
    for name, tensor in tensors.items():
        match = _CHUNK.match(name)
        if match:
            name = f"blocks.{int(match['chunk']) * size + int(match['place'])}.{match['rest']}"
        if name.endswith("scale_mul_1H11") and tensor.ndim == 4:
            tensor = tensor.transpose(1, 2) if tensor.shape[1] == 1 else tensor
        if name not in _DERIVED:
            found[name] = tensor
    return found


def reference_names(tensors: Mapping[str, Tensor], config: InfinityConfig) -> dict[str, Tensor]:
    """The tensors of a transformer by the reference's names."""
    if config.chunks == 1:
        return dict(tensors)
    size, found = config.depth // config.chunks, {}
    for name, tensor in tensors.items():
        match = re.match(r"blocks\.(\d+)\.(.+)", name)
        if match:
            chunk, place = divmod(int(match[1]), size)
            name = f"block_chunks.{chunk}.module.{place}.{match[2]}"
        found[name] = tensor
    return found


def own_tokenizer_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a tokenizer by the names that ``BSQTokenizer`` has, its constants left out."""
    return {
        _NESTED_NORM.sub(r"\1.\2", _NESTED.sub(r"\1.\2", name)): tensor
        for name, tensor in tensors.items()
        if re.match(r"(encoder|decoder)\.", name)
    }


def reference_tokenizer_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a tokenizer by the reference's names."""
    return {_PLAIN_NORM.sub(r"\1.norm.\2", _PLAIN.sub(r"\1.conv.\2", name)): tensor for name, tensor in tensors.items()}
