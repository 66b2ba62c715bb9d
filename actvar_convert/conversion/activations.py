"""Calibration: what the dense model's blocks see and do on real token pyramids, one block at a time.

Memory does not grow with depth: the hidden states of all pyramids exist once, and are replaced batch by batch as a
block runs; beside them only what is asked for of the block in hand is kept.
Shapes: P pyramids, B of them in a batch, L tokens, C width, S scales, T sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actvar_convert.models.base import Call, Passed, Schedule, walk
from actvar_convert.models.model import Model
from actvar_convert.system.device import trim_memory

TRIM_EVERY = 8
"""Batches after which free memory between the kept states goes back to the system."""
NULL_EVERY = 4
"""Of so many calibration pyramids one is without a condition: guidance runs every image with and without its own."""


class Calibration(NamedTuple):
    """Pyramids that the dense model is measured on.

    Attributes:
        tokens: [P, L, ...] int64.
        condition: P entries.
        batch: pyramids per forward pass.
    """

    tokens: Tensor
    condition: Any
    batch: int

    def first(self, pyramids: int) -> Calibration:
        """The first pyramids alone."""
        return Calibration(self.tokens[:pyramids], self.condition.rows(slice(pyramids)), self.batch)

    def mixed(self) -> Any:
        """The conditions, every fourth of which says nothing."""
        return self.condition.partly_null(NULL_EVERY)

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Any]]:
        """Tokens and mixed conditions of every batch, on a device."""
        condition = self.mixed()
        for begin in range(0, len(self.tokens), self.batch):
            part = slice(begin, begin + self.batch)
            yield self.tokens[part].to(device), condition.rows(part).to(device)


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
        context: what the block took from the condition; None if only the states are known.
    """

    begin: int
    before: Tensor
    after: Tensor
    context: Any = None

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
        call: of all tokens, as the block got it.
        states: batch by batch; empty if they were not wanted.
        ffn_input: per scale, FFN inputs [T_s, C] of randomly chosen tokens; T_s = 0 if they were not wanted.
    """

    index: int
    call: Call
    states: list[States]
    ffn_input: list[Tensor]


class _Samples:
    """FFN inputs of one block at chosen tokens, gathered batch by batch."""

    def __init__(self, choice: list[Tensor], scales: Iterable[int], like: Tensor) -> None:
        self.choice = choice
        self.kept = [like.new_empty(0, like.shape[-1]) for _ in choice]
        for scale in scales:
            self.kept[scale] = like.new_empty(len(choice[scale]), like.shape[-1])

    def add(self, x_BLC: Tensor, first: int, schedule: Schedule) -> None:
        """Takes the chosen tokens of a batch whose first pyramid has the number ``first``."""
        for scale, kept in enumerate(self.kept):
            if len(kept):
                length = schedule.lengths[scale]
                place = self.choice[scale] - first * length
                here = (place >= 0) & (place < len(x_BLC) * length)
                kept[here] = x_BLC[:, schedule.slice(scale)].flatten(0, 1)[place[here]]


@torch.no_grad()
def first_states(model: Model, calibration: Calibration) -> tuple[list[Tensor], list[Any], Call]:
    """Batch by batch, the states [B, L, C] before the first block and the prepared conditions; and the blocks' call."""
    states, prepared = [], []
    for tokens, condition in calibration.batches(model.device):
        x, own, call = model.start(condition, model.teacher_forcing_input(tokens))
        states.append(x)
        prepared.append(own)
    return states, prepared, call


def record_blocks(
    model: Model, calibration: Calibration, *, wanted: Callable[[int], Wanted], tokens_per_scale: int, seed: int
) -> Iterator[tuple[Any, BlockRecord]]:
    """Runs the pyramids through the dense backbone block by block and yields what each block did.

    A record is as large as the states of all pyramids; drop it before asking for the next, and only one is there.

    Args:
        model: dense model, any device; records stay on its device.
        calibration: the pyramids.
        wanted: what to record of a block, by its index.
        tokens_per_scale: FFN inputs kept per scale.
        seed: of the choice of tokens.
    """
    schedule = model.schedule
    states, prepared, call = first_states(model, calibration)
    generator = torch.Generator().manual_seed(seed)
    choice = [
        torch.randperm(len(calibration.tokens) * length, generator=generator)[:tokens_per_scale].to(model.device)
        for length in schedule.lengths
    ]
    steps = walk(model.transformer.blocks, states, prepared, call, observe=True)
    for index, (block, passing) in enumerate(steps):
        # Not a decorator of the generator, which would hold on to what it yielded last: see the last line.
        with torch.no_grad():
            samples = _Samples(choice, wanted(index).ffn, states[0])
            record = BlockRecord(index, call, [], samples.kept)
            _fill(record, samples, passing, wanted(index).states_from, schedule)
        yield block, record
        del record


def _fill(
    record: BlockRecord, samples: _Samples, passing: Iterator[Passed], states_from: int | None, schedule: Schedule
) -> None:
    """Runs a block on all batches and keeps what is wanted of it."""
    first = 0
    for passed in passing:
        if states_from is not None:
            begin = schedule.begins[states_from]
            before = passed.before[:, begin:].clone() if begin else passed.before
            record.states.append(States(begin, before, passed.after, passed.context))
        assert passed.ffn_input is not None
        samples.add(passed.ffn_input, first, schedule)
        first += len(passed.before)
        if passed.number % TRIM_EVERY == TRIM_EVERY - 1:
            trim_memory()
