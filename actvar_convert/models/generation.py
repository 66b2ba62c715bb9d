"""Generation step by step: a batch of images on its way through the scales, every scale's work as one call.

A step has static shapes and never waits for the device: no value is read back, no branch depends on data. So it can be
recorded as a CUDA graph (``models/graphs.py``). Where that could break, for a review: ``filter_logits`` and ``draw``
(sampling.py), ``TokenGate.choose`` (gate.py), ``take`` and ``merge`` (kernels/token_gate.py) and
the way that ``kernels.expert_ffn`` picks; the loop over experts does wait.
``tests/models/test_graphs.py`` runs a step on tensors without values, which fails at any such place, and on a GPU
counts the waits.

Shapes: B images, R B rows (2: guidance, conditional, then unconditional; 1: it is folded in), L_s tokens of scale s, C
width, V codebook size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actvar_convert.models.attention import GenerationCache
from actvar_convert.models.sampling import Sampling, draw, filter_logits, guided
from actvar_convert.models.var import Span, VARTransformer
from actvar_convert.models.vqvae import MultiScaleQuantizer


class Generation:
    """One batch under way.

    What depends on the class or on the weights alone is computed here, once per image: modulation, positions with
    levels, and at the first step the attention's constants.

    Args:
        transformer: dense or sparse.
        quantizer: of the tokenizer that goes with it.
        labels_B: classes, int64, on the transformer's device.
        sampling: how tokens are drawn.
    """

    def __init__(
        self, transformer: VARTransformer, quantizer: MultiScaleQuantizer, labels_B: Tensor, sampling: Sampling
    ) -> None:
        self._transformer, self._quantizer, self._sampling = transformer, quantizer, sampling
        config = transformer.config
        self._rows = transformer.rows_per_image
        null_B = torch.full_like(labels_B, transformer.null_class)
        condition = transformer.class_emb(labels_B if self._rows == 1 else torch.cat((labels_B, null_B)))
        self._modulation = transformer.modulation(condition)
        self._positions = transformer.positions(0, config.pyramid.total)
        self._dtype = transformer.pos_start.dtype
        self._cache = GenerationCache(config, len(condition), labels_B.device, self._dtype)
        self._x = transformer.first_tokens(condition)
        self._f_hat: Tensor | None = None

    def step(self, scale: int, noise_BLV: Tensor) -> Tensor:
        """Tokens [B, L_s] of one scale; scales in order.

        Args:
            scale: s.
            noise_BLV: exponential numbers [B, L_s, V] fp32, see ``Noise``.
        """
        transformer, pyramid, x = self._transformer, self._transformer.config.pyramid, self._x
        span = Span(scale, (pyramid.lengths[scale],))
        for block, modulation in zip(transformer.blocks, self._modulation.blocks, strict=True):
            x = block(x, modulation, span, cache=self._cache)
        logits = transformer.logits(x, self._modulation.head)
        if self._rows == 2:
            logits = guided(logits, self._sampling.strength(scale, pyramid.num_scales))
        index = draw(filter_logits(logits, self._sampling.top_k, self._sampling.top_p), noise_BLV)
        if scale + 1 < pyramid.num_scales:
            self._x = self._input(scale, index)
        return index

    def _input(self, scale: int, index_BL: Tensor) -> Tensor:
        """Hidden states [R B, L_(s+1), C] of the next scale, from the tokens just drawn."""
        added = self._quantizer.contribution(scale, index_BL)
        self._f_hat = added if self._f_hat is None else self._f_hat + added
        following = self._quantizer.next_input(self._f_hat, scale + 1).to(self._dtype)
        return self._transformer.next_tokens(following, scale + 1, self._positions).repeat(self._rows, 1, 1)
