"""Infinity as a family: how it is built, conditioned, guided and priced.

Source of the reference figures: github.com/FoundationVision/Infinity, ``infinity/models``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from actvar_convert.errors import InputError, counted
from actvar_convert.models.alphabet import Bits
from actvar_convert.models.base import Guidance, Sampling
from actvar_convert.models.infinity.config import BSQConfig, InfinityConfig
from actvar_convert.models.infinity.network import InfinityTransformer
from actvar_convert.models.infinity.schedules import largest, schedule_of
from actvar_convert.models.infinity.text import TextRows
from actvar_convert.models.infinity.tokenizer import BSQTokenizer
from actvar_convert.models.var.family import convolution_macs

PRICED_TEXT = 64
"""Text rows of the prompt that costs are stated for."""


class InfinityFamily:
    """Next-scale prediction of bits from text over maps of any published ratio (arXiv 2412.04431)."""

    name = "infinity"
    reads_text = True
    config_type = InfinityConfig
    tokenizer_config_type = BSQConfig

    def backbone(self, config: InfinityConfig) -> InfinityTransformer:
        return InfinityTransformer(config)

    def tokenizer(self, config: BSQConfig) -> BSQTokenizer:
        return BSQTokenizer(config)

    def alphabet(self, config: InfinityConfig) -> Bits:
        return Bits(config.bits)

    def guidance(self, config: InfinityConfig, sampling: Sampling, *, folded: bool) -> Guidance:
        """``cfg`` is the reference's: cfg c + (1 - cfg) u, 1 is none; without any, an image takes one row."""
        scales = config.num_scales
        strengths = tuple(cfg - 1 for cfg in sampling.by_scale("cfg", scales))
        rows = 2 if any(strengths) and not folded else 1
        return Guidance(strengths, rows, sampling.temperatures(scales), sampling.layer(config.depth))

    def condition(self, config: InfinityConfig, given: TextRows | Sequence[Tensor]) -> TextRows:
        """Text rows, or a list of the rows [length, Ct] of every prompt."""
        if not isinstance(given, TextRows):
            if isinstance(given, Tensor) or not all(isinstance(each, Tensor) and each.ndim == 2 for each in given):
                raise InputError(
                    "an Infinity makes images of text rows: give TextRows(values, lengths), the last hidden states of "
                    "its text encoder without padding, or a list of such rows, a tensor [rows, channels] a prompt"
                )
            if not given:
                return TextRows(torch.zeros(0, config.text_width), [])
            given = TextRows(torch.cat(list(given)), [len(each) for each in given])
        if given.values.shape[1] != config.text_width:
            raise InputError(
                f"text rows have {given.values.shape[1]} channels, the model reads {config.text_width}; make them with "
                "the text encoder that the model was trained with (flan-t5-xl for the published ones)"
            )
        long = [number for number, length in enumerate(given.lengths) if length > config.text_length]
        if long:
            raise InputError(
                f"{counted(len(long), 'prompt')} of more than {config.text_length} text rows, which is what the model "
                f"reads: the first is prompt {long[0]} of {given.lengths[long[0]]}. Shorten them."
            )
        return given

    def at(self, config: InfinityConfig, tokenizer: BSQConfig, schedule: object) -> tuple[InfinityConfig, BSQConfig]:
        """Maps [(h, w), ...] of a published ratio, or a name: ``1M``, ``0.25M@1.5`` (height / width)."""
        chosen = schedule_of(schedule)
        largest(chosen)
        try:
            return (
                InfinityConfig(**{**config.model_dump(), "maps": chosen.maps}),
                BSQConfig(**{**tokenizer.model_dump(), "maps": chosen.maps}),
            )
        except ValidationError as error:
            raise InputError(f"no schedule: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error

    def balanced(self, config: InfinityConfig, count: int) -> TextRows:
        """Random rows of the size that an encoder's are after their norm; they mean nothing."""
        length = min(8, config.text_length)
        made = [
            torch.randn(length, config.text_width, generator=torch.Generator().manual_seed(i)) for i in range(count)
        ]
        return TextRows(torch.cat(made) if made else torch.zeros(0, config.text_width), [length] * count)

    def classes(self, config: InfinityConfig) -> int | None:
        return None

    def image_bytes(self, config: InfinityConfig, tokenizer: BSQConfig, itemsize: int, rows: int) -> int:
        """An image of R rows costs 2 R D (L + N) C numbers for its keys and values, and those of the text. To these
        come, at the largest scale, the hidden states of a block, R L_s (2 H + 8 C) numbers, and the logits with what
        guidance, filters and sampling make of them. Afterwards the decoder takes six of its widest maps, in fp32.
        """
        largest_scale = max(config.schedule.lengths)
        cache = 2 * rows * config.depth * (config.schedule.total + PRICED_TEXT) * config.width * itemsize
        states = rows * largest_scale * (2 * config.hidden + 8 * config.width) * itemsize
        states += (12 * rows + 16) * largest_scale * 2 * config.bits
        pixels = config.schedule.lengths[-1] * tokenizer.downsampling**2
        return max(cache + states, 6 * pixels * tokenizer.ch * max(tokenizer.ch_mult[:2]) * 4)

    def costs(self, config: InfinityConfig) -> InfinityCosts:
        return InfinityCosts(config)

    def decoder_macs(self, tokenizer: BSQConfig) -> int:
        return convolution_macs(tokenizer, tokenizer.schedule.lengths[-1] * tokenizer.patch**2, attention=False)


INFINITY = InfinityFamily()


@dataclass(frozen=True)
class InfinityCosts:
    """Multiply-adds of the transformer's parts for one row, for a prompt of ``PRICED_TEXT`` text rows; the text encoder
    is not counted. C the width, Ct channels and N rows of the text, k kept tokens, T their context, D bits.
    """

    config: InfinityConfig

    def block(self, kept: int, context: int) -> dict[str, int]:
        """Self-attention as VAR's, 4 C^2 k and 2 k T C; cross-attention 2 C^2 k for queries and output, 2 k N C."""
        width = self.config.width
        return {
            "attention_projections": 4 * width * width * kept,
            "attention_products": 2 * kept * context * width,
            "cross_attention": 2 * width * width * kept + 2 * kept * PRICED_TEXT * width,
        }

    def ffn(self) -> int:
        """2 C H."""
        return 2 * self.config.width * self.config.hidden

    def scale(self, scale: int) -> dict[str, int]:
        """The head, 2 C D a token."""
        return {"head": 2 * self.config.width * self.config.bits * self.config.schedule.lengths[scale]}

    def once(self, scale: int) -> dict[str, int]:
        """The word embedding; the first scale's input is the prompt."""
        tokens = self.config.schedule.lengths[scale] if scale else 0
        return {"word_embedding": tokens * self.config.bits * self.config.width}

    def block_once(self) -> dict[str, int]:
        """Keys and values of the text, 2 C^2 N."""
        return {"cross_attention": 2 * self.config.width**2 * PRICED_TEXT}

    def image(self) -> dict[str, int]:
        """The shared modulation and that of the head; the text's two layers, and the pool with its keys and values."""
        width, text = self.config.width, self.config.text_width
        layers = PRICED_TEXT * (text * width + width**2)
        pool = 2 * PRICED_TEXT * text * width + width**2 + 2 * PRICED_TEXT * width
        return {"adaln": 8 * width**2, "text": layers + pool}
