"""How much an error matters at the output of an FFN or of a block: second moments of the loss gradient there.

If such an output is off by d at a token, the model's next-token distributions move by about

    KL = 1/2 E[(g . d)^2] = 1/2 d' G d,   G = E[g g'],   g = gradient of -log p(y) at that output, y drawn from p,

summed over tokens (the Fisher information in place of the Hessian). G is measured once per block; how it differs
between scales is kept as one factor per scale. Shapes: P pyramids, B of a batch, L tokens, C width, S scales, V codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from actvar_convert.conversion.activations import calibration_labels
from actvar_convert.models.config import TokenPyramid
from actvar_convert.models.model import VARModel
from actvar_convert.models.sampling import draw
from actvar_convert.models.var import Block, Span
from actvar_convert.system.atomic import write_whole


class OutputMetric(NamedTuple):
    """What an error in one of a block's outputs costs.

    Attributes:
        root: R [C, C] fp32 with R R' = G, G being the mean of g g' over all tokens of all scales.
        scales: [S], mean of |g|^2 at each scale over its mean at all tokens.
    """

    root: Tensor
    scales: Tensor

    def damage(self, error_TC: Tensor, scale: int, tokens: int) -> Tensor:
        """Nats of KL per pyramid that errors like these [T, C] cost at the ``tokens`` of one scale; 0-dim."""
        return 0.5 * tokens * self.scales[scale] * (error_TC.float() @ self.root).square().sum(1).mean()


class BlockMetrics(NamedTuple):
    """Metrics of one block: at the output of its FFN, before gate2, and at its own output."""

    ffn: OutputMetric
    block: OutputMetric


class _Moments:
    """Sums of g g' and, by scale, of |g|^2."""

    def __init__(self, width: int, pyramid: TokenPyramid, device: torch.device) -> None:
        self.pyramid = pyramid
        self.moment = torch.zeros(width, width, device=device)
        self.size = torch.zeros(pyramid.num_scales, dtype=torch.float64, device=device)

    def add(self, gradient_BLC: Tensor) -> None:
        flat = gradient_BLC.flatten(0, 1).float()
        with torch.autocast(flat.device.type, enabled=False):
            self.moment.addmm_(flat.T, flat)
        per_token = gradient_BLC.double().square().sum((0, 2))
        self.size += torch.stack([part.sum() for part in torch.split(per_token, list(self.pyramid.lengths))])

    def metric(self, pyramids: int) -> OutputMetric:
        lengths = self.size.new_tensor(self.pyramid.lengths)
        tokens = pyramids * self.pyramid.total
        mean = (self.size.sum() / tokens).clamp_min(torch.finfo(torch.float64).tiny)
        values, vectors = torch.linalg.eigh((self.moment / tokens).double())
        root = vectors * values.clamp_min(0).sqrt()
        return OutputMetric(root.float(), (self.size / (pyramids * lengths) / mean).float())


def output_metrics(
    model: VARModel,
    tokens_PL: Tensor,
    labels_P: Tensor,
    *,
    batch: int,
    seed: int,
    autocast: torch.dtype | None = None,
    state: Path | None = None,
    on_batch: Callable[[int], None] = lambda pyramids: None,
    rank: int = 0,
    processes: int = 1,
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> list[BlockMetrics]:
    """The metrics of every block, measured on calibration pyramids.

    Blocks are gone through backwards one at a time, each computed anew from its stored input: memory is that of one
    block with gradients, D B L C numbers, and 2 D C^2 for the result.

    Args:
        model: dense model; no gradient of a weight is computed.
        tokens_PL: pyramids, int64; labels_P: their classes, every fourth of which is replaced by the null class.
        batch: pyramids at once.
        seed: of the drawn codes.
        autocast: half-precision format to compute in; moments are summed in fp32 all the same.
        state: file in which sums are kept as batches are done; a call that finds it goes on from there, to the same
            result. It has to belong to the same model, pyramids and settings.
        on_batch: told the number of pyramids done.
        rank, processes: this process among those that share the batches by turns; all draw the same codes. They cannot
            go on from a ``state``.
        total: the sum of a tensor over all processes.
    """
    transformer = model.transformer
    pyramid, width, depth = transformer.config.pyramid, transformer.config.width, transformer.config.depth
    moments = [(_Moments(width, pyramid, model.device), _Moments(width, pyramid, model.device)) for _ in range(depth)]
    labels = calibration_labels(labels_P.to(model.device), transformer.null_class)
    generator = torch.Generator().manual_seed(seed)
    span, mask = Span(0, pyramid.lengths), transformer.attn_bias_for_masking.to(model.dtype)
    done = _restore(state, moments, generator)
    parts = list(zip(torch.split(tokens_PL, batch), torch.split(labels, batch), strict=True))
    if done:
        on_batch(sum(len(tokens) for tokens, _ in parts[:done]))
    for number, (tokens, label) in enumerate(parts[done:], start=done + 1):
        if (number - 1) % processes != rank:
            _noise(len(tokens) * pyramid.total, transformer.config.vocab, generator=generator)
            on_batch(len(tokens))
            continue
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            with torch.no_grad():
                x, modulation = transformer.embed(label, model.teacher_forcing_input(tokens.to(model.device)))
                inputs = []
                for block, own in zip(transformer.layers, modulation.blocks, strict=True):
                    inputs.append(x)
                    x = block(x, own, span, mask)
            gradient = _gradient_at_end(model, x, modulation.head, generator)
            for block, own in reversed(list(zip(transformer.layers, modulation.blocks, strict=True))):
                moments[block.index][1].add(gradient)
                gradient, at_ffn = _through(block, inputs.pop(), own, span, mask, gradient)
                moments[block.index][0].add(at_ffn)
        if state is not None:
            write_whole(state, safetensors.torch.save(_tensors(moments, generator, number)))
        on_batch(len(tokens))
    for sums in (each for pair in moments for each in pair):
        sums.moment, sums.size = total(sums.moment), total(sums.size)
    found, count = [], len(tokens_PL)
    while moments:  # a block's sums go before the next block's roots come
        found.append(BlockMetrics(*(sums.metric(count) for sums in moments.pop(0))))
    return found


def _tensors(moments: list[tuple[_Moments, _Moments]], generator: torch.Generator, batches: int) -> dict[str, Tensor]:
    """All sums, and what the next batch needs besides."""
    kept = {"batches": torch.tensor(batches), "generator": generator.get_state()}
    for block, pair in enumerate(moments):
        for name, own in zip(("ffn", "block"), pair, strict=True):
            kept |= {f"{block}.{name}.moment": own.moment.cpu(), f"{block}.{name}.size": own.size.cpu()}
    return kept


def _restore(state: Path | None, moments: list[tuple[_Moments, _Moments]], generator: torch.Generator) -> int:
    """Takes up what ``_tensors`` gave, where there is such a file; returns the number of batches done."""
    if state is None:
        return 0
    try:
        kept = safetensors.torch.load(state.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return 0
    for block, pair in enumerate(moments):
        for name, own in zip(("ffn", "block"), pair, strict=True):
            own.moment.copy_(kept[f"{block}.{name}.moment"])
            own.size.copy_(kept[f"{block}.{name}.size"])
    generator.set_state(kept["generator"])
    return int(kept["batches"])


def _gradient_at_end(model: VARModel, x_BLC: Tensor, head_B2C: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient [B, L, C] of -log p(y), summed over tokens, at the last block's output; y drawn from p."""
    with torch.enable_grad():
        x_BLC = x_BLC.detach().requires_grad_()
        logits = model.transformer.logits(x_BLC, head_B2C).flatten(0, 1).float()
        drawn = draw(logits.detach(), _noise(*logits.shape, generator=generator))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), x_BLC)
    return gradient


def _noise(tokens: int, vocab: int, *, generator: torch.Generator) -> Tensor:
    """The exponential numbers [T, V] that one batch's codes are drawn with."""
    return torch.empty(tokens, vocab).exponential_(1, generator=generator)


def _through(
    block: Block, x_BLC: Tensor, modulation_B6C: Tensor, span: Span, mask_LL: Tensor, gradient_BLC: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradient at a block's output to those at its input and at its FFN's output, each [B, L, C]."""
    outputs: list[Tensor] = []
    handle = block.ffn.register_forward_hook(lambda _, args, out: outputs.append(out))
    try:
        with torch.enable_grad():
            x_BLC = x_BLC.detach().requires_grad_()
            y = block(x_BLC, modulation_B6C, span, mask_LL)
    finally:
        handle.remove()
    at_input, at_ffn = torch.autograd.grad(y, (x_BLC, outputs[0]), gradient_BLC)
    return at_input, at_ffn
