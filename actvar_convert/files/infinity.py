"""What the files of an Infinity look like: names of its tensors, its shape by theirs, the published models.

Names are the reference's (FoundationVision/Infinity): blocks in groups, ``block_chunks.I.module.J``, convolutions and
norms of the tokenizer nested once more than their kind needs (``conv1.conv.weight``). Other programs leave either out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError, counted
from actvar_convert.files.layout import Levels, Names, Votes, count, messages
from actvar_convert.models.base import Sampling
from actvar_convert.models.infinity.config import BSQConfig, InfinityConfig
from actvar_convert.models.infinity.schedules import Maps, published
from actvar_convert.models.var.config import MAX_BLOCKS
from actvar_convert.recipe.shape import Shape

_CHUNK = re.compile(r"^block_chunks\.(?P<chunk>\d+)\.(?:module\.)?(?P<place>\d+)\.(?P<rest>.+)$")
_NESTED = re.compile(
    r"((?:^|\.)(?:conv_in|conv_out|conv1|conv2|nin_shortcut|(?:down|up)sample\.conv))\.conv\.(weight|bias)$"
)
_NESTED_NORM = re.compile(r"((?:^|\.)(?:norm1|norm2|norm_out))\.norm\.(weight|bias)$")
_PLAIN = re.compile(r"((?:^|\.)(?:conv_in|conv_out|conv1|conv2|nin_shortcut|(?:down|up)sample\.conv))\.(weight|bias)$")
_PLAIN_NORM = re.compile(r"((?:^|\.)(?:norm1|norm2|norm_out))\.(weight|bias)$")
_DERIVED = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
"""Buffers of a training that follow from its settings."""

NAMES = Names(
    "infinity",
    re.compile(
        r"^(?P<prefix>(?:.*\.)?)(?P<name>cfg_uncond|text_norm\.weight|text_proj_for_sos\.ca\.mat_(?:q|kv\.weight)"
        r"|text_proj_for_ca\.[02]\.weight)$"
    ),
    re.compile(
        r"^(?P<prefix>(?:.*\.)?)(?P<name>(?:encoder|decoder)\.(?:conv_in|conv_out|mid\.block_[12]\.conv1)"
        r"(?:\.conv)?\.weight)$"
    ),
)


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformer by the names that ``InfinityTransformer`` has."""
    places = [int(match["place"]) for match in map(_CHUNK.match, tensors) if match]
    size, found = max(places, default=0) + 1, {}
    for name, tensor in tensors.items():
        match = _CHUNK.match(name)
        if match:
            name = f"blocks.{int(match['chunk']) * size + int(match['place'])}.{match['rest']}"
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


def infer_transformer(tensors: Mapping[str, Tensor], maps: Maps, hints: Mapping[str, Any]) -> InfinityConfig:
    """Configuration of a transformer from names and shapes of its tensors.

    Args:
        tensors: by the reference's names, blocks in groups or not; meta tensors will do.
        maps: token maps, which no tensor tells.
        hints: the config.json beside the file.

    Raises:
        CheckpointError: something cannot be read from the file.
    """
    chunks = {int(match["chunk"]) for match in map(_CHUNK.match, tensors) if match}
    own = own_names(tensors)
    depth = count(own, r"blocks\.(\d+)\.", "blocks", MAX_BLOCKS)
    block = [f"blocks.{index}" for index in range(depth)]
    if any(f"{name}.{other}.weight" in own for name in block for other in ("ffn.fcg", "ada_lin.1")):
        raise CheckpointError(
            "this Infinity has gated FFNs (ffn.fcg) or a modulation of its own in every block (ada_lin), as no "
            "published one has; such models cannot be loaded."
        )
    vote = Votes(own)
    scales = [own[name] for each in block if (name := f"{each}.sa.scale_mul_1H11") in own]
    flash = sum(each.ndim == 4 and each.shape[1] == 1 for each in scales) > len(scales) / 2
    width = vote(
        "width", ("lvl_embed.weight", 1), ("pos_start", 2), ("head.weight", 1), ("word_embed.bias", 0),
        *((f"{name}.sa.proj.weight", 0) for name in block),
    )  # fmt: skip
    values = {
        "width": width,
        "hidden": vote(
            "FFN hidden neurons", *((f"{b}.ffn.fc1.{leaf}", 0) for b in block for leaf in ("weight", "bias"))
        ),
        "heads": vote("heads", *((f"{name}.sa.scale_mul_1H11", 2 if flash else 1) for name in block)),
        "bits": vote("bits of a token", ("word_embed.weight", 1)),
        "text_width": vote("text channels", ("cfg_uncond", 1), ("text_norm.weight", 0)),
        "text_length": vote("text rows", ("cfg_uncond", 0)),
        "pool_heads": vote("heads of the pool", ("text_proj_for_sos.ca.mat_q", 1)),
        "levels": vote("levels", ("lvl_embed.weight", 0)),
    }
    vote.finish()
    try:
        return InfinityConfig(
            depth=depth,
            **values,
            maps=maps,
            chunks=len(chunks) or 1,
            flash_scale=flash,
            cross_gate=vote.any(f"{name}.ca_gamma" for name in block),
            norm_eps=hints.get("norm_eps", 1e-6),
        )
    except ValidationError as error:
        raise CheckpointError("the transformer's shapes contradict each other:", messages(error)) from error


def infer_tokenizer(tensors: Mapping[str, Tensor], bits: int | None, maps: Maps) -> BSQConfig:
    """Configuration of a tokenizer from its tensors, for a transformer of so many bits a token (None: of its codes).

    Raises:
        CheckpointError: something cannot be read from the file, or its codes do not make such tokens.
    """
    own = own_tokenizer_names(tensors)
    vote = Votes(own)
    levels = Levels.of(own, vote)
    channels = vote("code channels", ("encoder.conv_out.bias", 0), ("decoder.conv_in.weight", 1))
    vote.finish()
    multipliers = levels.multipliers
    bits = channels if bits is None else bits
    if bits not in (channels, 4 * channels):
        raise CheckpointError(
            f"the transformer predicts tokens of {bits} bits, and the tokenizer makes codes of {channels} (or squares "
            f"of them, {4 * channels}). Give the tokenizer that the transformer was trained with."
        )
    patch = 1 if bits == channels else 2
    try:
        return BSQConfig(
            ch=levels.ch,
            ch_mult=multipliers,
            res_blocks=levels.blocks,
            z_channels=channels,
            patch=patch,
            maps=maps,
        )
    except ValidationError as error:
        raise CheckpointError("the tokenizer's shapes contradict each other:", messages(error)) from error


class Published(NamedTuple):
    """A published model.

    Attributes:
        depth, width, heads, bits: of the transformer.
        mult, channels: multipliers and code channels of the tokenizer.
        size: of the images, a schedule's name.
        weights, vae: their files in the repository; a folder ends in a slash.
        tau: temperature of the reference's figures.
    """

    depth: int
    width: int
    heads: int
    bits: int
    mult: tuple[int, ...]
    channels: int
    size: str
    weights: str
    vae: str
    tau: float

    def configs(self) -> tuple[InfinityConfig, BSQConfig]:
        """The shapes of both."""
        maps, patch = published(self.size).maps, 1 if self.bits == self.channels else 2
        transformer = InfinityConfig(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            hidden=round(4 * self.width / 256) * 256,
            bits=self.bits,
            text_width=2048,
            text_length=512,
            pool_heads=16,
            maps=maps,
            chunks=4 if self.depth == 12 else 8,
        )
        own = {"ch": 128, "ch_mult": self.mult, "res_blocks": 2, "z_channels": self.channels}
        return transformer, BSQConfig(**own, patch=patch, maps=maps)


_D16 = ((1, 2, 4, 4, 4), 16)
_8B = (40, 3584, 28, 56, (1, 2, 4, 4), 14)
_8B_VAE = "infinity_vae_d56_f8_14_patchify.pth"
REPOSITORY = "FoundationVision/Infinity"
PUBLISHED = {
    "infinity-125m": Published(
        12, 768, 8, 16, *_D16, "0.06M", "infinity_125M_256x256.pth", "infinity_vae_d16.pth", 1.0
    ),
    "infinity-2b": Published(
        *(32, 2048, 16, 32, (1, 2, 4, 4, 4), 32), "1M", "infinity_2b_reg.pth", "infinity_vae_d32reg.pth", 0.5
    ),
    "infinity-8b": Published(*_8B, "1M", "infinity_8b_weights/", _8B_VAE, 1.0),
    "infinity-8b-512": Published(*_8B, "0.25M", "infinity_8b_512x512_weights/", _8B_VAE, 1.0),
}
"""The published models by name, files of the hub's repository."""


def _same_shape(config: InfinityConfig, but: set[str]) -> Published | None:
    """The published model of a shape, whatever these fields are."""
    for each in PUBLISHED.values():
        known = each.configs()[0]
        if config.model_dump(exclude=but) == known.model_dump(exclude=but):
            return each
    return None


def published_sampling(config: InfinityConfig) -> Sampling:
    """The sampling of the reference: that of the published model of this shape, else that of most."""
    known = _same_shape(config, {"maps", "chunks"})
    return Sampling(cfg=4.0, top_k=900, top_p=0.97, tau=1.0 if known is None else known.tau)


def usual_size(path: Path, width: int) -> tuple[str, str]:
    """The size of the images of a model by the name of its file or folder, and what says so."""
    for name in (path.name, path.absolute().parent.name):
        for size, pixels in (("0.06M", "256x256"), ("0.25M", "512x512"), ("1M", "1024x1024")):
            if pixels in name:
                return size, f"{name} says {pixels} pixels"
    small = PUBLISHED["infinity-125m"]
    return (small.size, "as published for this width") if width == small.width else ("1M", "as published")


def infer_whole(
    transformer: Mapping[str, Tensor], known: Shape, hints: Mapping[str, Any], at: Path
) -> tuple[InfinityConfig, list[str]]:
    """The configuration of a transformer that is whole, and what was assumed.

    Raises:
        CheckpointError: see ``infer_transformer``; or blocks at the end are missing.
    """
    other = [name for name in ("heads", "sides", "residual_ratio", "using_znorm") if name in known.given]
    if other:
        raise InputError(
            f"{' and '.join(other)}: of an Infinity its file tells them, or it has none. Leave them out; maps are a "
            "schedule, such as --shape schedule=0.25M."
        )
    config, notes = infer_transformer(transformer, published("1M").maps, hints), []
    if known.schedule is not None:
        maps = published(known.schedule).maps
    else:
        size, why = usual_size(at, config.width)
        maps = published(size).maps
        notes.append(f"images of {size} pixels were taken ({why}); --shape schedule=... gives others, as 0.25M@1.5")
    config = InfinityConfig(**{**config.model_dump(), "maps": maps})
    published_one = _same_shape(config, {"maps", "chunks", "depth"})
    said = hints.get("depth")
    whole = said if type(said) is int else 0 if published_one is None else published_one.depth
    if whole > config.depth:
        told = "its config.json says" if said else "the published model of this width has"
        raise CheckpointError(
            f"the file ends after {counted(config.depth, 'block')}; {told} {whole}. It is incomplete: get it from its "
            f'source again. If the model is that shallow, say so in a config.json beside the file: {{"depth": '
            f"{config.depth}}}."
        )
    return config, notes


def doubts(config: InfinityConfig, vae: Path) -> list[str]:
    """What the name of a tokenizer's file says against it: one of equal shape makes bad pictures."""
    right = PUBLISHED["infinity-2b"]
    if config.bits == right.bits and "d32" in vae.name and "reg" not in vae.name:
        return [
            f"{vae.name} has the right shape and makes bad pictures: Infinity-2B was trained with {right.vae} of "
            f"huggingface.co/{REPOSITORY}; give that one"
        ]
    return []
