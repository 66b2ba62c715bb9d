"""Calibration: what the dense model's blocks see and do on real token pyramids, one block at a time.

Memory does not grow with depth: the hidden states of all pyramids exist once, and are replaced batch by batch as a
block runs; beside them only what is asked for of the block in hand is kept.
Shapes: P pyramids, B of them in a batch, L tokens, C width, S scales, T sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from actvar_convert.models.config import TokenPyramid
from actvar_convert.models.model import VARModel
from actvar_convert.models.var import Block, Span, VARTransformer
from actvar_convert.system.device import release_pages

TRIM_EVERY = 8
"""Batches after which free memory between the kept states goes back to the system."""
NULL_SHARE = 0.25
"""Share of calibration pyramids that carry the null class: guidance runs every image with and without its class."""


class Wanted(NamedTuple):
    """What is needed of a block's record.

    Attributes:
        ffn: scales whose FFN inputs are sampled.
        states_from: first scale whose hidden states are kept, with all after it; None: none are.
    """

    ffn: frozenset[int]
    states_from: int | None


class States(NamedTuple):
    """Hidden states of one batch around a block.

    Attributes:
        before: [B, L - begin, C] at the block's input, from position ``begin`` of the sequence on.
        after: [B, L, C] at its output.
        modulation: [B, 6, C] of its adaptive norms; None where only the states are known.
    """

    begin: int
    before: Tensor
    after: Tensor
    modulation: Tensor | None = None

    def at(self, part: slice) -> tuple[Tensor, Tensor]:
        """Input and output [B, L_s, C] of the tokens at ``part`` of the sequence."""
        return self.before[:, part.start - self.begin : part.stop - self.begin], self.after[:, part]

    def update(self, part: slice) -> Tensor:
        """What the block added to the tokens at ``part``, [B, L_s, C]."""
        before, after = self.at(part)
        return after - before


@dataclass
class BlockRecord:
    """What one dense block did on the calibration pyramids.

    Attributes:
        index: of the block.
        states: batch by batch; empty where they were not wanted.
        ffn_input: per scale, FFN inputs [T_s, C] of randomly chosen tokens; T_s = 0 where they were not wanted.
    """

    index: int
    states: list[States]
    ffn_input: list[Tensor]


class _Samples:
    """FFN inputs of one block at chosen tokens, gathered batch by batch."""

    def __init__(self, choice: list[Tensor], scales: Iterable[int], like: Tensor) -> None:
        self.choice = choice
        self.kept = [like.new_empty(0, like.shape[-1]) for _ in choice]
        for scale in scales:
            self.kept[scale] = like.new_empty(len(choice[scale]), like.shape[-1])

    def add(self, x_BLC: Tensor, first: int, pyramid: TokenPyramid) -> None:
        """Takes the chosen tokens of a batch whose first pyramid has the number ``first``."""
        for scale, kept in enumerate(self.kept):
            if len(kept):
                length = pyramid.lengths[scale]
                place = self.choice[scale] - first * length
                here = (place >= 0) & (place < len(x_BLC) * length)
                kept[here] = x_BLC[:, pyramid.slice(scale)].flatten(0, 1)[place[here]]


def calibration_labels(labels_P: Tensor, null_class: int) -> Tensor:
    """A copy of the classes [P] in which every fourth is the null class.

    Of labels that go round a multiple of four classes, another quarter of the classes in every round.
    """
    every, place = round(1 / NULL_SHARE), torch.arange(len(labels_P), device=labels_P.device)
    if null_class % every == 0:
        place += place // null_class
    return labels_P.masked_fill(place % every == 0, null_class)


@torch.no_grad()
def first_states(
    model: VARModel, tokens_PL: Tensor, labels_P: Tensor, batch: int
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor | None]]]:
    """Batch by batch, the states [B, L, C] before the first block and what the blocks' modulations are made from."""
    transformer = model.transformer
    labels = calibration_labels(labels_P.to(model.device), transformer.null_class)
    states, conditions = [], []
    for tokens, label in zip(torch.split(tokens_PL, batch), torch.split(labels, batch), strict=True):
        inputs = model.teacher_forcing_input(tokens.to(model.device))
        states.append(transformer.embed(label, inputs)[0])
        conditions.append(transformer.condition(label))
    return states, conditions


def record_blocks(
    model: VARModel,
    tokens_PL: Tensor,
    labels_P: Tensor,
    *,
    wanted: Callable[[int], Wanted],
    batch: int,
    tokens_per_scale: int,
    seed: int,
) -> Iterator[tuple[Block, BlockRecord]]:
    """Runs the pyramids through the dense transformer block by block and yields what each block did.

    A record is as large as the states of all pyramids; drop it before asking for the next, and only one is there.

    Args:
        model: dense model, any device; records stay on its device.
        tokens_PL: calibration pyramids, int64.
        labels_P: their classes; every fourth is replaced by the null class.
        wanted: what to record of a block, by its index.
        batch: pyramids per forward pass.
        tokens_per_scale: FFN inputs kept per scale.
        seed: of the choice of tokens.
    """
    transformer, pyramid = model.transformer, model.transformer.config.pyramid
    states, conditions = first_states(model, tokens_PL, labels_P, batch)
    generator = torch.Generator().manual_seed(seed)
    choice = [
        torch.randperm(len(tokens_PL) * length, generator=generator)[:tokens_per_scale].to(model.device)
        for length in pyramid.lengths
    ]
    for index, block in enumerate(transformer.layers):
        # Not a decorator of the generator, which would hold on to what it yielded last: see the last line.
        with torch.no_grad():
            record = _record_block(transformer, index, wanted(index), choice, states, conditions)
        yield block, record
        del record


def _record_block(
    transformer: VARTransformer,
    index: int,
    wanted: Wanted,
    choice: list[Tensor],
    states: list[Tensor],
    conditions: list[tuple[Tensor, Tensor | None]],
) -> BlockRecord:
    """Runs one block on the states of all batches, which it replaces by the block's outputs."""
    pyramid, block = transformer.config.pyramid, transformer.layers[index]
    span, mask = Span(0, pyramid.lengths), transformer.attn_bias_for_masking.to(states[0].dtype)
    samples = _Samples(choice, wanted.ffn, states[0])
    record = BlockRecord(index, [], samples.kept)
    seen: list[Tensor] = []
    handle = block.ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first = 0
    try:
        for number, condition in enumerate(conditions):
            x = states[number]
            modulation = block.modulation(*condition)
            states[number] = block(x, modulation, span, mask)
            if wanted.states_from is not None:
                begin = pyramid.begins[wanted.states_from]
                before = x[:, begin:].clone() if begin else x
                record.states.append(States(begin, before, states[number], modulation))
            samples.add(seen.pop(), first, pyramid)
            first += len(x)
            if number % TRIM_EVERY == TRIM_EVERY - 1:
                release_pages(())
    finally:
        handle.remove()
    return record
