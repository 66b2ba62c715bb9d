"""VAR as a family: how it is built, conditioned, guided and priced.

Source of the reference figures: github.com/FoundationVision/VAR, ``models/var.py`` and ``models/basic_vae.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from actvar_convert.errors import InputError
from actvar_convert.models.alphabet import Codes
from actvar_convert.models.base import Guidance, Sampling, Schedule
from actvar_convert.models.sampling import balanced_labels
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.labels import Labels
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE, Channels


class VARFamily:
    """Next-scale prediction from class labels over square maps of codes (arXiv 2404.02905)."""

    name = "var"
    reads_text = False
    config_type = TransformerConfig
    tokenizer_config_type = TokenizerConfig

    def backbone(self, config: TransformerConfig) -> VARTransformer:
        return VARTransformer(config)

    def tokenizer(self, config: TokenizerConfig) -> VQVAE:
        return VQVAE(config)

    def alphabet(self, config: TransformerConfig) -> Codes:
        return Codes(config.vocab)

    def guidance(self, config: TransformerConfig, sampling: Sampling, *, folded: bool) -> Guidance:
        """The strength grows linearly from 0 at the first scale to ``cfg`` at the last, or is that of every scale."""
        scales, cfg = config.num_scales, sampling.cfg
        if isinstance(cfg, tuple):
            strengths = sampling.by_scale("cfg", scales)
        else:
            strengths = tuple(cfg * scale / max(1, scales - 1) for scale in range(scales))
        layer = sampling.layer(config.depth)
        return Guidance(strengths, 1 if folded else 2, sampling.temperatures(scales), layer)

    def condition(self, config: TransformerConfig, given: Labels | Tensor | Sequence[int] | int) -> Labels:
        """Class indices; -1 or the number of classes says no class. They are checked where they are."""
        return given if isinstance(given, Labels) else Labels.given(given, config.classes)

    def at(
        self, config: TransformerConfig, tokenizer: TokenizerConfig, schedule: object
    ) -> tuple[TransformerConfig, TokenizerConfig]:
        """Positions are learnt, one embedding each: there are no other maps."""
        if Schedule.of(schedule) != config.schedule:
            raise InputError("the token maps of a VAR are fixed, for its positions are learnt; leave schedule out")
        return config, tokenizer

    def balanced(self, config: TransformerConfig, count: int) -> Labels:
        return Labels.of(balanced_labels(count, config.classes), config.classes)

    def classes(self, config: TransformerConfig) -> int | None:
        return config.classes

    def image_bytes(self, config: TransformerConfig, tokenizer: TokenizerConfig, itemsize: int, rows: int) -> int:
        """An image of R rows costs 2 R D L C numbers for its keys and values. To these come, at the largest scale, the
        hidden states of a block, R L_s (2 H + 8 C) numbers, and the logits with what guidance, filters and sampling
        make of them, (12 R + 16) L_s V bytes. Afterwards the decoder takes six of its widest maps, in fp32.
        """
        largest = max(config.schedule.lengths)
        cache = 2 * rows * config.depth * config.schedule.total * config.width * itemsize
        states = rows * largest * (2 * config.hidden + 8 * config.width) * itemsize
        states += (12 * rows + 16) * largest * config.vocab
        maps = 6 * tokenizer.image_size**2 * tokenizer.ch * max(tokenizer.ch_mult[:2]) * 4
        return max(cache + states, maps)

    def costs(self, config: TransformerConfig) -> VARCosts:
        return VARCosts(config)

    def decoder_macs(self, tokenizer: TokenizerConfig) -> int:
        return sum(decoder_macs(tokenizer))


VAR = VARFamily()


@dataclass(frozen=True)
class VARCosts:
    """Multiply-adds of the transformer's parts for one row; C the width, k kept tokens, T their context."""

    config: TransformerConfig

    def block(self, kept: int, context: int) -> dict[str, int]:
        """Query, key, value and output projections 4 C^2 k; scores and weighted sums 2 k T C."""
        width = self.config.width
        return {"attention_projections": 4 * width * width * kept, "attention_products": 2 * kept * context * width}

    def ffn(self) -> int:
        """2 C H."""
        return 2 * self.config.width * self.config.hidden

    def scale(self, scale: int) -> dict[str, int]:
        """The classifier over the codebook."""
        return {"head": self.config.schedule.lengths[scale] * self.config.width * self.config.vocab}

    def once(self, scale: int) -> dict[str, int]:
        """The word embedding; the first scale's input is the class."""
        config = self.config
        tokens = config.schedule.lengths[scale] if scale else 0
        return {"word_embedding": tokens * config.z_channels * config.width}

    def block_once(self) -> dict[str, int]:
        """A block's own modulation; 0 if all blocks share one projection."""
        return {"adaln": 0 if self.config.shared_adaln else 6 * self.config.width**2}

    def image(self) -> dict[str, int]:
        """The modulation that belongs to no block: before the head, and the shared projection."""
        return {"adaln": (2 + (6 if self.config.shared_adaln else 0)) * self.config.width**2}


class DecoderMacs(NamedTuple):
    """Multiply-adds from tokens to an image.

    Attributes:
        convolutions: ``post_quant_conv`` and every convolution of the decoder, its attention's 1x1 ones included.
        attention: scores and weighted sums of the decoder's attention.
        phi: one phi convolution per scale at the resolution of the finest token map.
    """

    convolutions: int
    attention: int
    phi: int


class _Conv(NamedTuple):
    inputs: int
    outputs: int
    kernel: int
    pixels: int

    @property
    def macs(self) -> int:
        return self.inputs * self.outputs * self.kernel**2 * self.pixels


def decoder_macs(config: TokenizerConfig) -> DecoderMacs:
    """Multiply-adds of the VQVAE decoder for one image."""
    side, z = config.sides[-1], config.z_channels
    phi = _Conv(z, z, 3, side**2).macs * config.schedule.num_scales if config.phis else 0
    convolutions = _Conv(z, z, config.quant_kernel, side**2).macs + convolution_macs(config, side**2)
    attentions = 1 + config.res_blocks + 1
    return DecoderMacs(convolutions, attentions * 2 * side**4 * config.ch * config.ch_mult[-1], phi)


def convolution_macs(config: Channels, tokens: int, attention: bool = True) -> int:
    """Multiply-adds of the convolutions of a ``Decoder`` from a map of so many features."""
    return sum(conv.macs for conv in _decoder_convolutions(config, tokens, attention))


def _decoder_convolutions(config: Channels, pixels: int, attention: bool) -> Iterator[_Conv]:
    widths = [config.ch * mult for mult in config.ch_mult]
    last = len(widths) - 1
    coarsest = widths[-1]
    yield _Conv(config.z_channels, coarsest, 3, pixels)
    yield from _residual(coarsest, coarsest, pixels)
    if attention:
        yield from _attention(coarsest, pixels)
    yield from _residual(coarsest, coarsest, pixels)
    for level in range(last, -1, -1):
        width, before = widths[level], widths[min(level + 1, last)]
        for index in range(config.res_blocks + 1):
            yield from _residual(width if index else before, width, pixels)
            if attention and level == last:
                yield from _attention(width, pixels)
        if level:
            pixels *= 4
            yield _Conv(width, width, 3, pixels)
    yield _Conv(widths[0], 3, 3, pixels)


def _residual(inputs: int, outputs: int, pixels: int) -> Iterator[_Conv]:
    yield _Conv(inputs, outputs, 3, pixels)
    yield _Conv(outputs, outputs, 3, pixels)
    if inputs != outputs:
        yield _Conv(inputs, outputs, 1, pixels)


def _attention(channels: int, pixels: int) -> Iterator[_Conv]:
    yield _Conv(channels, 3 * channels, 1, pixels)
    yield _Conv(channels, channels, 1, pixels)
