"""Shapes of an Infinity transformer and of its tokenizer, as frozen values."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actvar_convert.models.infinity.schedules import RATIOS, Maps
from actvar_convert.models.schedule import Schedule
from actvar_convert.models.var.config import MAX_BLOCKS, MAX_TOKENS

_MAX_WIDTH, _MAX_HIDDEN = 2**16, 2**20
_Side = Annotated[int, Field(ge=1)]
_MAPS = "(height, width) of the token map of each scale, coarse to fine, unless a call gives others"


def require_maps(maps: Maps, levels: int) -> None:
    """Raises ValueError for maps that make no pyramid, or one of more scales or tokens than are supported."""
    if not maps or any(len(each) != 2 or min(each) < 1 for each in maps):
        raise ValueError(f"maps must be pairs (height, width) of at least 1, got {maps}")
    if list(maps) != sorted(maps, key=lambda each: each[0] * each[1]):
        raise ValueError(f"maps must go from coarse to fine, got {maps}")
    if len(maps) > levels:
        raise ValueError(f"{len(maps)} scales, and the model knows {levels} levels")
    tokens = sum(h * w for h, w in maps)
    if tokens > MAX_TOKENS:
        raise ValueError(f"maps of {tokens:,} tokens; at most {MAX_TOKENS:,} are supported")


class InfinityConfig(BaseModel):
    """Shape of an Infinity transformer (reference: ``infinity/models/infinity.py`` of FoundationVision/Infinity)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int = Field(ge=1, le=MAX_BLOCKS, description="blocks")
    width: int = Field(ge=1, le=_MAX_WIDTH, description="channels C of the hidden state")
    heads: int = Field(ge=1, le=_MAX_WIDTH, description="attention heads; divides width")
    hidden: int = Field(ge=1, le=_MAX_HIDDEN, description="hidden neurons H of each FFN")
    bits: int = Field(ge=1, le=1024, description="bits D of a token")
    text_width: int = Field(ge=1, le=_MAX_WIDTH, description="channels Ct of a text row")
    text_length: int = Field(ge=1, le=2**16, description="text rows of a prompt at most")
    pool_heads: int = Field(ge=1, le=_MAX_WIDTH, description="heads of the attention that pools the text")
    levels: int = Field(15, ge=1, le=64, description="level embeddings; scales at most")
    maps: tuple[tuple[_Side, _Side], ...] = Field(RATIOS[1.0], description=_MAPS)
    chunks: int = Field(1, ge=1, description="groups of blocks in the names of the reference; 1: blocks stand alone")
    flash_scale: bool = Field(
        False, description="learnt scales of queries as [1, 1, heads, 1], as some trainings store"
    )
    cross_gate: bool = Field(False, description="a learnt gate on what cross-attention adds")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the norms")

    @model_validator(mode="after")
    def _consistent(self) -> InfinityConfig:
        require_maps(self.maps, self.levels)
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"{self.heads} heads do not divide width {self.width} into multiples of 4 channels")
        if self.width % self.pool_heads:
            raise ValueError(f"{self.pool_heads} heads of the pool do not divide width {self.width}")
        if self.depth % self.chunks:
            raise ValueError(f"{self.chunks} chunks do not divide {self.depth} blocks")
        return self

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.maps)

    @property
    def num_scales(self) -> int:
        return len(self.maps)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def l2_attention(self) -> bool:
        """Queries and keys are normalised; a learnt scale per head takes the place of ``attention_scale``."""
        return True

    @property
    def attention_scale(self) -> float:
        return 1.0


class BSQConfig(BaseModel):
    """Shape of a tokenizer of binary spherical codes (reference: ``infinity/models/bsq_vae``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ch: int = Field(ge=1, le=_MAX_WIDTH, description="base channels; a multiple of 32 (group normalisation)")
    ch_mult: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        min_length=1, max_length=16, description="channel multiplier of each resolution, fine to coarse"
    )
    res_blocks: int = Field(
        ge=1, le=64, description="residual blocks per resolution in the encoder; the decoder has one more"
    )
    z_channels: int = Field(ge=1, le=1024, description="channels d of a code, one bit each")
    patch: int = Field(1, ge=1, le=2, description="codes per side of a token: 2, a token is a square of four codes")
    maps: tuple[tuple[_Side, _Side], ...] = Field(RATIOS[1.0], description=_MAPS)

    @model_validator(mode="after")
    def _consistent(self) -> BSQConfig:
        require_maps(self.maps, len(self.maps))
        if self.ch % 32:
            raise ValueError(f"ch {self.ch} is not a multiple of 32, the groups of the normalisation")
        return self

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.maps)

    @property
    def bits(self) -> int:
        """Bits D of a token."""
        return self.z_channels * self.patch**2

    @property
    def downsampling(self) -> int:
        """Pixels per side of a token of the finest scale."""
        return int(2 ** (len(self.ch_mult) - 1)) * self.patch

    @property
    def image_size(self) -> int:
        """Pixels per side of a square of as many pixels as the image."""
        return round(math.sqrt(self.schedule.lengths[-1]) * self.downsampling)
