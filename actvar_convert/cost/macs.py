"""What one image costs in multiply-adds, by arithmetic on configuration and plan alone.

Convention, the only place that states it:

- One MAC is one multiply-add; 1 MAC = 2 FLOPs. The unit is one image, generated scale by scale with a cache of keys
  and values.
- Counted: the query, key, value and output projections; attention scores and weighted sums over the actual context (a
  token of scale s attends to the scales 0 to s); the FFN, of which a sparse block runs its prefix and its routed
  experts; router, token gate, and low-rank reconstruction; AdaLN; word embedding; head; and the VQVAE decoder: its
  convolutions (``post_quant_conv`` included), the products of its attention, and one phi convolution per scale at
  full resolution.
- Guidance runs every row twice, with the class and with the null class, and doubles all of the transformer but the word
  embedding, which is computed once and repeated. A plan that folds guidance into the predictions runs one row. The
  decoder sees one row either way.
- AdaLN depends on the class alone and is counted once per image, for dense and sparse alike.
- A token that a block skips pays for its share of the gate, for its key and value projections where the plan computes
  them (4 C^2 FLOPs), and for the low-rank map of the reconstruction. Where the plan drops its key and value instead,
  the context of that block is shorter by it, at this scale and at all later ones.
- Routed experts count with the K of the plan.
- Not counted: norms, activations, softmax, biases, other elementwise work (the alpha product and the bilinear
  upsampling of the reconstruction, averaging of scores over a neighbourhood), table look-ups, interpolation, sampling,
  gather and scatter.

Source of the reference figures: github.com/FoundationVision/VAR, ``models/var.py`` and ``models/basic_vae.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.plan import SparsityPlan

FLOPS_PER_MAC = 2

BLOCK_COMPONENTS = ("attention_projections", "attention_products", "ffn", "router", "gate", "reconstruction")
TRANSFORMER_COMPONENTS = (*BLOCK_COMPONENTS, "adaln", "word_embedding", "head")
COMPONENTS = (*TRANSFORMER_COMPONENTS, "vqvae_decoder")

NOT_COUNTED = (
    "norms",
    "activations",
    "softmax",
    "biases",
    "elementwise products and sums",
    "interpolation",
    "sampling",
    "gather and scatter",
)


def rows(guidance: bool, plan: SparsityPlan | None = None) -> int:
    """Rows of the transformer per image; ``plan`` None is the dense model."""
    return 1 if not guidance else 2 if plan is None else plan.rows


def context_tokens(config: TransformerConfig, plan: SparsityPlan, block: int, scale: int) -> int:
    """Tokens whose keys and values a token of one scale meets in one block."""
    pyramid = config.pyramid
    if plan.skipped_kv == "computed":
        return pyramid.ends[scale]
    return sum(plan.blocks[block].kept(s, pyramid.lengths[s]) for s in range(scale + 1))


def block_macs(config: TransformerConfig, plan: SparsityPlan, block: int, scale: int) -> dict[str, int]:
    """MACs of one block at one scale for one row, by component of BLOCK_COMPONENTS; without AdaLN.

    With C the width, N the neurons of an expert, n + K the active experts, k of L tokens kept, T the context:
    projections 4 C^2 k (+ 2 C^2 (L - k)), products 2 k T C, FFN 2 C N (n + K) k, router (C E_r [+ C w + w E_r]) k,
    gate C L, reconstruction 2 C r (L - k).
    """
    C, length = config.width, config.pyramid.lengths[scale]
    kept = plan.blocks[block].kept(scale, length)
    skipped = length - kept
    projections = 4 * C * C * kept
    if plan.skipped_kv == "computed":
        projections += 2 * C * C * skipped
    router = 0
    if plan.routes(block, scale):
        scored, width = plan.router_experts(block), plan.router_width
        router = kept * (C * scored + C * width + width * scored)
    low_rank = plan.reconstruction in ("low_rank", "mixture")
    return {
        "attention_projections": projections,
        "attention_products": 2 * kept * context_tokens(config, plan, block, scale) * C,
        "ffn": round(kept * plan.active(block, scale) * (config.hidden / plan.experts) * 2 * C),
        "router": router,
        "gate": length * C if skipped else 0,
        "reconstruction": 2 * C * plan.reconstruction_rank * skipped if low_rank else 0,
    }


def word_embedding_macs(config: TransformerConfig, scale: int) -> int:
    """MACs of the word embedding at one scale, once whatever the guidance; the first scale's input is the class."""
    return config.pyramid.lengths[scale] * config.z_channels * config.width if scale else 0


def head_macs(config: TransformerConfig, scale: int) -> int:
    """MACs of the classifier over the codebook at one scale for one row."""
    return config.pyramid.lengths[scale] * config.width * config.vocab


def block_adaln_macs(config: TransformerConfig) -> int:
    """MACs of one block's own modulation for one row; 0 where all blocks share one projection."""
    return 0 if config.shared_adaln else 6 * config.width**2


def common_adaln_macs(config: TransformerConfig) -> int:
    """MACs of the modulation that belongs to no block, for one row: before the head, and the shared projection."""
    return (2 + (6 if config.shared_adaln else 0)) * config.width**2


def transformer_macs(config: TransformerConfig, plan: SparsityPlan | None, guidance: bool = True) -> int:
    """MACs of the transformer per image, as one number; ``plan`` None is the dense model."""
    plan = plan or SparsityPlan.dense(config)
    scales = range(config.pyramid.num_scales)
    row = common_adaln_macs(config) + config.depth * block_adaln_macs(config)
    row += sum(head_macs(config, scale) for scale in scales)
    row += sum(sum(block_macs(config, plan, b, s).values()) for b in range(config.depth) for s in scales)
    return rows(guidance, plan) * row + sum(word_embedding_macs(config, scale) for scale in scales)


class DecoderMacs(NamedTuple):
    """MACs from tokens to an image.

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
    side: int

    @property
    def macs(self) -> int:
        return self.inputs * self.outputs * self.kernel**2 * self.side**2


def decoder_macs(config: TokenizerConfig) -> DecoderMacs:
    """MACs of the VQVAE decoder for one image."""
    widths = [config.ch * mult for mult in config.ch_mult]
    side, z = config.sides[-1], config.z_channels
    attentions = 1 + config.res_blocks + 1
    phi = _Conv(z, z, 3, side).macs * config.pyramid.num_scales
    convolutions = sum(conv.macs for conv in _decoder_convolutions(config, widths))
    return DecoderMacs(convolutions, attentions * 2 * side**4 * widths[-1], phi)


def _decoder_convolutions(config: TokenizerConfig, widths: list[int]) -> Iterator[_Conv]:
    side, z, last = config.sides[-1], config.z_channels, len(widths) - 1
    coarsest = widths[-1]
    yield _Conv(z, z, 3, side)
    yield _Conv(z, coarsest, 3, side)
    yield from _residual(coarsest, coarsest, side)
    yield from _attention(coarsest, side)
    yield from _residual(coarsest, coarsest, side)
    for level in range(last, -1, -1):
        width, before = widths[level], widths[min(level + 1, last)]
        for index in range(config.res_blocks + 1):
            yield from _residual(width if index else before, width, side)
            if level == last:
                yield from _attention(width, side)
        if level:
            side *= 2
            yield _Conv(width, width, 3, side)
    yield _Conv(widths[0], 3, 3, side)


def _residual(inputs: int, outputs: int, side: int) -> Iterator[_Conv]:
    yield _Conv(inputs, outputs, 3, side)
    yield _Conv(outputs, outputs, 3, side)
    if inputs != outputs:
        yield _Conv(inputs, outputs, 1, side)


def _attention(channels: int, side: int) -> Iterator[_Conv]:
    yield _Conv(channels, 3 * channels, 1, side)
    yield _Conv(channels, channels, 1, side)
