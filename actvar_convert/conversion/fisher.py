"""How much an error matters at the output of an FFN or of a block: second moments of the loss gradient there.

If such an output is off by d at a token, the model's next-token distributions move by about

    KL = 1/2 E[(g . d)^2] = 1/2 d' G d,   G = E[g g'],   g = gradient of -log p(y) at that output, y sampled from p,

summed over tokens (the Fisher information in place of the Hessian). G is measured once per block; how it differs
between scales is kept as one factor per scale. Shapes: P pyramids, B of a batch, L tokens, C width, S scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from actvar_convert.conversion.activations import Calibration
from actvar_convert.models.base import Call, Schedule, inner, walk
from actvar_convert.models.model import Model
from actvar_convert.system.atomic import read_checked, write_checked
from actvar_convert.system.processes import ALONE, Processes


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
    """Metrics of one block: at the output of its FFN, before any gate, and at its own output."""

    ffn: OutputMetric
    block: OutputMetric


class _Moments:
    """Sums of g g' and, by scale, of |g|^2."""

    def __init__(self, width: int, schedule: Schedule, device: torch.device) -> None:
        self.schedule = schedule
        self.moment = torch.zeros(width, width, device=device)
        self.size = torch.zeros(schedule.num_scales, dtype=torch.float64, device=device)

    def add(self, gradient_BLC: Tensor) -> None:
        flat = gradient_BLC.flatten(0, 1).float()
        with torch.autocast(flat.device.type, enabled=False):
            self.moment.addmm_(flat.T, flat)
        per_token = gradient_BLC.double().square().sum((0, 2))
        self.size += torch.stack([part.sum() for part in torch.split(per_token, list(self.schedule.lengths))])

    def metric(self, pyramids: int) -> OutputMetric:
        lengths = self.size.new_tensor(self.schedule.lengths)
        tokens = pyramids * self.schedule.total
        mean = (self.size.sum() / tokens).clamp_min(torch.finfo(torch.float64).tiny)
        values, vectors = torch.linalg.eigh((self.moment / tokens).double())
        root = vectors * values.clamp_min(0).sqrt()
        return OutputMetric(root.float(), (self.size / (pyramids * lengths) / mean).float())


@dataclass(frozen=True)
class Measuring:
    """How metrics are measured.

    Attributes:
        seed: of the sampled tokens.
        autocast: half-precision dtype to compute in; moments are summed in fp32 all the same.
        state: file in which sums are kept as batches are done; a call that finds it goes on from there, to the same
            result. It has to belong to the same model, pyramids and settings.
        processes: those that share the batches by turns; all sample the same tokens. They cannot go on from a
            ``state``.
        on_batch: told the number of pyramids done.
    """

    seed: int
    autocast: torch.dtype | None = None
    state: Path | None = None
    processes: Processes = ALONE
    on_batch: Callable[[int], None] = lambda pyramids: None


def output_metrics(model: Model, calibration: Calibration, how: Measuring) -> list[BlockMetrics]:
    """The metrics of every block, measured on calibration pyramids.

    Blocks are gone through backwards one at a time, each computed anew from its stored input: memory is that of one
    block with gradients, D B L C numbers, and 2 D C^2 for the result.

    Args:
        model: dense model; no gradient of a weight is computed.
        calibration: the pyramids.
        how: see ``Measuring``.
    """
    backbone, schedule, device = model.transformer, model.schedule, model.device
    width, depth = backbone.head.in_features, len(backbone.blocks)
    moments = [(_Moments(width, schedule, device), _Moments(width, schedule, device)) for _ in range(depth)]
    generator = torch.Generator().manual_seed(how.seed)
    done = _restore(how.state, moments, generator)
    parts = list(calibration.batches(device))
    if done:
        how.on_batch(sum(len(tokens) for tokens, _ in parts[:done]))
    for number, (tokens, condition) in enumerate(parts[done:], start=done + 1):
        noise = _noise(tokens, model, generator)
        if (number - 1) % how.processes.count == how.processes.rank:
            with torch.autocast(device.type, how.autocast, enabled=how.autocast is not None, cache_enabled=False):
                _add_batch(model, condition, tokens, noise, moments)
            if how.state is not None:
                write_checked(how.state, safetensors.torch.save(_tensors(moments, generator, number)))
        how.on_batch(len(tokens))
    for sums in (each for pair in moments for each in pair):
        sums.moment, sums.size = how.processes.total(sums.moment), how.processes.total(sums.size)
    found, count = [], len(calibration.tokens)
    while moments:  # a block's sums go before the next block's roots come
        found.append(BlockMetrics(*(sums.metric(count) for sums in moments.pop(0))))
    return found


def _add_batch(
    model: Model, condition: Any, tokens: Tensor, noise: Tensor, moments: list[tuple[_Moments, _Moments]]
) -> None:
    """Adds the gradients of one batch, last block first."""
    with torch.no_grad():
        x, prepared, call = model.start(condition, model.teacher_forcing_input(tokens))
        states, inputs = [x], []
        for _, passing in walk(model.transformer.blocks, states, [prepared], call):
            inputs += [passed.before for passed in passing]
    gradient = _gradient_at_end(model, states[0], prepared, noise)
    for block, (at_ffn, at_block) in zip(reversed(model.transformer.blocks), reversed(moments), strict=True):
        at_block.add(gradient)
        gradient, of_ffn = _through(block, inputs.pop(), prepared, call, gradient)
        at_ffn.add(of_ffn)


def _tensors(moments: list[tuple[_Moments, _Moments]], generator: torch.Generator, batches: int) -> dict[str, Tensor]:
    """All sums, and what the next batch needs besides."""
    kept = {"batches": torch.tensor(batches), "generator": generator.get_state()}
    for block, pair in enumerate(moments):
        for name, own in zip(("ffn", "block"), pair, strict=True):
            kept |= {f"{block}.{name}.moment": own.moment.cpu(), f"{block}.{name}.size": own.size.cpu()}
    return kept


def _restore(state: Path | None, moments: list[tuple[_Moments, _Moments]], generator: torch.Generator) -> int:
    """Takes up what ``_tensors`` gave, if there is such a file, whole; returns the number of batches done."""
    if state is None:
        return 0
    content = read_checked(state)
    if content is None:
        return 0
    kept = safetensors.torch.load(content)
    for block, pair in enumerate(moments):
        for name, own in zip(("ffn", "block"), pair, strict=True):
            own.moment.copy_(kept[f"{block}.{name}.moment"])
            own.size.copy_(kept[f"{block}.{name}.size"])
    generator.set_state(kept["generator"])
    return int(kept["batches"])


def _gradient_at_end(model: Model, x_BLC: Tensor, prepared: Any, noise: Tensor) -> Tensor:
    """Gradient [B, L, C] of -log p(y), summed over tokens, at the last block's output; y sampled from p."""
    alphabet = model.alphabet
    with torch.enable_grad():
        x_BLC = x_BLC.detach().requires_grad_()
        logits = model.transformer.logits(x_BLC, prepared).float()
        sampled = alphabet.draw(logits.detach(), noise, 0, 0.0)
        (gradient,) = torch.autograd.grad(alphabet.surprise(logits, sampled).sum(), x_BLC)
    return gradient


def _noise(tokens: Tensor, model: Model, generator: torch.Generator) -> Tensor:
    """The exponential numbers [B, L, *outcomes] that one batch's tokens are sampled with."""
    return torch.empty(*tokens.shape[:2], *model.alphabet.outcomes).exponential_(1, generator=generator)


def _through(block: Any, x_BLC: Tensor, prepared: Any, call: Call, gradient_BLC: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient at a block's output to those at its input and at its FFN's output, each [B, L, C]."""
    outputs: list[Tensor] = []
    handle = inner(block).ffn.register_forward_hook(lambda _, args, out: outputs.append(out))
    with torch.no_grad():
        context = inner(block).context(prepared)
    try:
        with torch.enable_grad():
            x_BLC = x_BLC.detach().requires_grad_()
            y = block(x_BLC, context, call)
    finally:
        handle.remove()
    at_input, at_ffn = torch.autograd.grad(y, (x_BLC, outputs[0]), gradient_BLC)
    return at_input, at_ffn
