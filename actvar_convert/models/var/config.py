"""Shapes of a VAR transformer and of its VQVAE tokenizer, as frozen values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actvar_convert.models.schedule import Schedule

MAX_TOKENS = 16384
"""Tokens of a pyramid; the largest published one has 2240."""

MAX_BLOCKS = 512

_MAX_WIDTH, _MAX_HIDDEN, _MAX_ROWS = 2**16, 2**20, 2**24
"""Far above any model: a shape beyond is made up or damaged, and refused before anything of its size is made."""


def _require_pyramid(sides: Sequence[int]) -> None:
    """Raises ValueError for sides that make no pyramid, or one of more tokens than are supported."""
    if any(side < 1 for side in sides) or list(sides) != sorted(set(sides)):
        raise ValueError(f"sides must be positive and strictly ascending, got {tuple(sides)}")
    tokens = sum(side * side for side in sides)
    if tokens > MAX_TOKENS:
        raise ValueError(f"sides make a pyramid of {tokens:,} tokens; at most {MAX_TOKENS:,} are supported")


class TransformerConfig(BaseModel):
    """Shape of a VAR transformer (reference: ``models/var.py`` of FoundationVision/VAR)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int = Field(ge=1, le=MAX_BLOCKS, description="blocks")
    width: int = Field(ge=1, le=_MAX_WIDTH, description="channels C of the hidden state")
    heads: int = Field(ge=1, le=_MAX_WIDTH, description="attention heads; divides width")
    hidden: int = Field(ge=1, le=_MAX_HIDDEN, description="hidden neurons H of each FFN")
    sides: tuple[int, ...] = Field(description="side of the token map of each scale, coarse to fine")
    vocab: int = Field(ge=2, le=_MAX_ROWS, description="codebook size V")
    z_channels: int = Field(ge=1, le=_MAX_WIDTH, description="channels of a codebook vector")
    classes: int = Field(ge=1, le=_MAX_ROWS, description="classes without the null class, whose index is this number")
    shared_adaln: bool = Field(False, description="one modulation projection for all blocks instead of one per block")
    l2_attention: bool = Field(True, description="L2-normalised queries and keys with a learnt scale per head")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the layer norms")

    @model_validator(mode="after")
    def _consistent(self) -> TransformerConfig:
        _require_pyramid(self.sides)
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.of_sides(self.sides)

    @property
    def num_scales(self) -> int:
        return len(self.sides)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products; with L2 normalisation the learnt scale takes its place."""
        return 1.0 if self.l2_attention else 0.25 / math.sqrt(self.head_dim)


class TokenizerConfig(BaseModel):
    """Shape of a multi-scale VQVAE (reference: ``models/vqvae.py`` of FoundationVision/VAR)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ch: int = Field(ge=1, le=_MAX_WIDTH, description="base channels; a multiple of 32 (group normalisation)")
    ch_mult: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        min_length=1, max_length=16, description="channel multiplier of each resolution, fine to coarse"
    )
    res_blocks: int = Field(
        ge=1, le=64, description="residual blocks per resolution in the encoder; the decoder has one more"
    )
    vocab: int = Field(ge=2, le=_MAX_ROWS, description="codebook size V")
    z_channels: int = Field(ge=1, le=_MAX_WIDTH, description="channels of a codebook vector")
    sides: tuple[int, ...] = Field(description="side of the token map of each scale, coarse to fine")
    residual_ratio: float = Field(0.5, ge=0, le=1, description="share of the phi convolution in its output")
    phis: int = Field(4, ge=0, le=64, description="phi convolutions shared among the scales; 0: none")
    quant_kernel: int = Field(3, ge=1, le=15, description="side of the convolutions before and after the code; odd")
    using_znorm: bool = Field(False, description="codes are compared by direction, not by distance")

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        _require_pyramid(self.sides)
        if self.ch % 32:
            raise ValueError(f"ch {self.ch} is not a multiple of 32, the groups of the normalisation")
        if self.quant_kernel % 2 == 0:
            raise ValueError(f"quant_kernel {self.quant_kernel} (quant_conv_ks in the reference) is not odd")
        return self

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule.of_sides(self.sides)

    @property
    def downsampling(self) -> int:
        """Pixels per side of a token of the finest scale."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def image_size(self) -> int:
        """Pixels per side of the image."""
        return self.sides[-1] * self.downsampling
