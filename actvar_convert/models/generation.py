"""Generation step by step: a batch of images on its way through the scales, every scale's work as one call.

A step has static shapes and never waits for the device: no value is read back, no branch depends on data. So it can be
recorded as a CUDA graph (``models/graphs.py``). Where that could break, for a review: ``filter_logits`` and ``draw``
(sampling.py), ``TokenGate.choose`` (gate.py), ``take`` and ``merge`` (kernels/token_gate.py), and the backend that
``kernels.expert_ffn`` picks; the loop over experts does wait. ``tests/models/test_graphs.py`` runs a step on tensors
without values, which fails at any such place, and on a GPU counts the waits.

Shapes: B images, R B rows (2: guidance, conditional, then unconditional; 1: it is folded in), L_s tokens of scale s.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from actvar_convert.models.base import Call, Sampling, Span, inner


class Generation:
    """One batch under way. What depends on the condition or on the weights alone is computed once per image.

    Args:
        model: the ``Model``, dense or sparse.
        condition: of B images, on the model's device.
        sampling: how tokens are sampled.
    """

    def __init__(self, model: Any, condition: Any, sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling
        self._guidance = model.guidance(sampling)
        rows = condition if self._guidance.rows == 1 else condition.joined(condition.null())
        backbone = model.transformer
        self._prepared = backbone.prepare(rows)
        self._contexts = [inner(block).context(self._prepared) for block in backbone.blocks]
        self._slots = backbone.slots(len(rows), model.schedule)
        self._f_hat: Tensor | None = None

    def step(self, scale: int, noise: Tensor) -> Tensor:
        """Tokens [B, L_s, ...] of one scale; scales in order.

        Args:
            scale: s.
            noise: exponential numbers [B, L_s, outcomes of a token] fp32, see ``Noise``.
        """
        model, backbone, schedule = self._model, self._model.transformer, self._model.schedule
        following = None
        if self._f_hat is not None:
            following = model.tokenizer.next_input(self._f_hat, scale, schedule).to(model.dtype)
        x = backbone.next_states(self._prepared, following, scale, schedule)
        part = schedule.slice(scale)
        span, table = Span(scale, (schedule.lengths[scale],)), backbone.table(schedule, part.start, part.stop)
        for index, block in enumerate(backbone.blocks):
            x = block(x, self._contexts[index], Call(span, table, self._slots[index]))
            x = self._guidance.after_block(x, index, scale)
        logits = self._guidance.guided(backbone.logits(x, self._prepared), scale)
        tokens = model.alphabet.draw(logits, noise, self._sampling.top_k, self._sampling.top_p)
        if scale + 1 < schedule.num_scales:
            self._f_hat = model.tokenizer.accumulate(self._f_hat, tokens, scale, schedule)
        drawn: Tensor = tokens
        return drawn
