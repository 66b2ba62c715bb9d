"""Weights refitted block by block, on the states that the sparse model has, to those that the dense model has.

What inactive experts and skipped tokens leave out adds up from block to block, in phase. Here each block takes its turn
to make up for what those before it did: with x' the states of the sparse model and x those of the dense one on the same
calibration tokens, attention's output projection is moved by dW so that x' + g1 (W + dW) a' comes close to x between
attention and FFN, then W2 in the same way so that the block's output does, then the head so that the logits do. Each
is one least-squares problem in closed form,

    dW = argmin  sum over tokens of  |r - g dW z|^2  +  ridge |dW|^2,

r being what is missing, z the input of the weights (for W2 the active hidden neurons, zero elsewhere) and g the gate
of the adaptive layer norm, which differs by class and channel. Its square is taken to be a product of one factor per
token and one per channel, so that one matrix serves all channels; fitted to the exact squares, channel by channel,
the KL was the same. Gates and reconstructions of skipped tokens are fitted anew too, before the weights.

No gradient descends and nothing but calibration tokens is needed. The order of the blocks is that of layer-wise
quantisation with error propagation (as in GPTQ, arXiv 2210.17323, whose inputs come from the quantised model; here the
target is the dense model's own state). A token costs what it did before.

Shapes: P pyramids, B of a batch, L tokens, K computed tokens, C width, H neurons, I inputs, O outputs of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from actvar_convert.conversion.activations import BlockRecord, Calibration, States, first_states
from actvar_convert.conversion.experts import active_neurons
from actvar_convert.conversion.gates import start_gate
from actvar_convert.kernels.token_gate import take
from actvar_convert.models.base import Call, Residual, inner, walk
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.gate import GatedBlock
from actvar_convert.models.model import Model
from actvar_convert.system.device import trim_memory

RIDGE = 0.1
"""Strength of the pull towards the dense weights, in units of the mean square of an input."""


class _GatedMoments:
    """Sums over tokens from which the step of one linear layer behind a gate follows; fp32, the solution in fp64."""

    def __init__(self, layer: nn.Linear) -> None:
        inputs, outputs, device = layer.in_features + 1, layer.out_features, layer.weight.device
        self._layer = layer
        self._gram = torch.zeros(inputs, inputs, device=device)
        self._cross = torch.zeros(inputs, outputs, device=device)
        self._by_token = torch.zeros((), device=device)
        self._by_channel = torch.zeros(outputs, device=device)

    def add(self, z_BKI: Tensor, missing_BKO: Tensor, gate_BO: Tensor | None = None) -> None:
        """Adds tokens: the layer's inputs, what is missing behind the gate, and the gate (None: 1)."""
        z, missing = z_BKI.float(), missing_BKO.float()
        z = torch.cat((z, torch.ones_like(z[..., :1])), -1)
        gate = missing.new_ones(len(z), missing.shape[-1]) if gate_BO is None else gate_BO.float()
        squares = gate.square()
        by_token = squares.mean(1)
        rows = (z * by_token.sqrt().view(-1, 1, 1)).flatten(0, 1)
        self._gram.addmm_(rows.T, rows)
        self._cross.addmm_(z.flatten(0, 1).T, (missing * gate.unsqueeze(1)).flatten(0, 1))
        self._by_token += z.shape[1] * by_token.square().sum()
        self._by_channel += z.shape[1] * (by_token @ squares)

    def move(self, ridge: float) -> None:
        """Moves weight and bias of the layer."""
        gram, by_channel = self._gram.double(), (self._by_channel / self._by_token.clamp_min(1e-20)).double()
        gram.diagonal().add_(ridge * float(gram.diagonal()[:-1].mean()) + 1e-9)
        step = torch.cholesky_solve(self._cross.double() / by_channel.clamp_min(1e-9), torch.linalg.cholesky(gram)).T
        self._layer.weight.add_(step[:, :-1].to(self._layer.weight.dtype))
        if self._layer.bias is not None:
            self._layer.bias.add_(step[:, -1].to(self._layer.bias.dtype))


class _Watch:
    """Notes what goes in and out of the linear layers whose outputs a block adds to the hidden state.

    Of the FFN, whose layers an ``ExpertFFN`` reads by itself, what goes in and out of the whole.

    Attributes:
        seen: (input, output) of each sub-layer, in order.
    """

    def __init__(self, block: Any, residuals: list[Residual]) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        modules = [*(each.layer for each in residuals[:-1]), block.ffn]
        self._handles = [module.register_forward_hook(self._keep) for module in modules]

    def _keep(self, _: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        self.seen.append((given[0], output))

    def taken(self) -> list[tuple[Tensor, Tensor]]:
        """What was seen since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def _watching(block: nn.Module, prepared: Any) -> Iterator[_Watch]:
    own = inner(block)
    watch = _Watch(own, own.residuals(own.context(prepared)))
    try:
        yield watch
    finally:
        watch.close()


def _after(x_BLC: Tensor, residuals: list[Residual], seen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The hidden state after some sub-layers: x plus their outputs, each by its gate."""
    for (_, gate), (_, output) in zip(residuals, seen, strict=False):
        x_BLC = x_BLC + output if gate is None else torch.addcmul(x_BLC, output, gate.unsqueeze(1))
    return x_BLC


class _Pass(NamedTuple):
    """One batch in one sparse block under one plan.

    Attributes:
        number: of the batch.
        x: input [B, K, C] of the computed tokens; rows: their positions [B, K].
        residuals: of the block. seen: input and output of each sub-layer.
    """

    number: int
    x: Tensor
    rows: Tensor
    residuals: list[Residual]
    seen: list[tuple[Tensor, Tensor]]


class _States:
    """The calibration pyramids on their way through the dense model and, plan by plan, through the sparse one."""

    def __init__(self, dense: Model, sparse: Model, calibration: Calibration) -> None:
        assert sparse.plans is not None
        self.plans = sparse.plans
        self.dense, self.prepared, self.call = first_states(dense, calibration)
        self.between: list[list[Tensor]] = []
        self.sparse = {name: list(self.dense) for name in sparse.plans.named}

    def advance_dense(self, block: nn.Module) -> None:
        """Runs the dense block; ``between`` are the states after each sub-layer, the last those after the block."""
        self.between = []
        own = inner(block)
        with _watching(block, self.prepared[0]) as watch:
            for _, passing in walk([block], self.dense, self.prepared, self.call):
                for passed in passing:
                    residuals, seen = own.residuals(passed.context), watch.taken()
                    befores = [_after(passed.before, residuals[: n + 1], seen) for n in range(len(residuals) - 1)]
                    self.between.append([*befores, passed.after])

    def record(self, index: int) -> BlockRecord:
        """From what the sparse model has before a block to what the dense one has after it, under the active plan."""
        states = [States(0, x, y) for x, y in zip(self.sparse[self.plans.name], self.dense, strict=True)]
        return BlockRecord(index, self.call, states, [])

    def fit(self, block: nn.Module, layer: int, ridge: float) -> None:
        """Moves the layer of one sub-layer towards the dense states after it; the last is the FFN's."""
        own = inner(block)
        linear = own.residuals(own.context(self.prepared[0]))[layer].layer
        moments = _GatedMoments(linear)
        last = linear is own.ffn.fc2
        for passed in self._through(block):
            reached = _after(passed.x, passed.residuals[: layer + 1], passed.seen)
            missing = take(self.between[passed.number][layer], passed.rows) - reached
            gate, given = passed.residuals[layer].gate, passed.seen[layer][0]
            if not last:
                moments.add(given, missing, gate)
                continue
            counts = list(_kept_counts(block, self.call))
            parts = zip(torch.split(given, counts, 1), torch.split(missing, counts, 1), strict=True)
            for scale, (inputs, part) in enumerate(parts):
                if inputs.shape[1]:
                    hidden, runs = active_neurons(own.ffn, inputs, scale)
                    moments.add((hidden * runs.unsqueeze(-1)).flatten(2), part, gate)
        moments.move(ridge)

    def advance(self, block: nn.Module) -> None:
        """Runs the sparse block under each of the plans."""
        for name, states in self.sparse.items():
            with self.plans.using(name):
                for _, passing in walk([block], states, self.prepared, self.call):
                    for _ in passing:
                        pass

    def fit_head(self, dense: Model, sparse: Model, ridge: float) -> None:
        """Moves the head towards the dense logits."""
        moments = _GatedMoments(sparse.transformer.head)
        for states in self.sparse.values():
            for own, x, prepared in zip(states, self.dense, self.prepared, strict=True):
                missing = dense.transformer.logits(x, prepared) - sparse.transformer.logits(own, prepared)
                moments.add(sparse.transformer.before_head(own, prepared), missing)
        moments.move(ridge)

    def _through(self, block: nn.Module) -> Iterator[_Pass]:
        """What passes through a sparse block, batch by batch, plan after plan."""
        own = inner(block)
        with _watching(block, self.prepared[0]) as watch:
            for name, states in self.sparse.items():
                with self.plans.using(name):
                    for number, (x, prepared) in enumerate(zip(states, self.prepared, strict=True)):
                        rows = _computed_rows(block, x, self.call)
                        if rows.shape[1]:  # under a plan that skips all tokens there is nothing to see
                            context = own.context(prepared)
                            block(x, context, self.call)
                            yield _Pass(number, take(x, rows), rows, own.residuals(context), watch.taken())


def _kept_counts(block: nn.Module, call: Call) -> tuple[int, ...]:
    return block.kept_counts(call.span) if isinstance(block, GatedBlock) else call.span.counts


def _computed_rows(block: nn.Module, x_BLC: Tensor, call: Call) -> Tensor:
    """Which tokens [B, K] a block computes."""
    if isinstance(block, GatedBlock):
        return block.computed_rows(x_BLC, call.span)
    return torch.arange(x_BLC.shape[1], device=x_BLC.device).expand(len(x_BLC), -1)


@torch.no_grad()
def refit_in_order(
    dense: Model,
    sparse: Model,
    calibration: Calibration,
    *,
    ridge: float = RIDGE,
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Refits output projections, output weights, gates, reconstructions and head of a converted model, in place.

    A model that carries several plans is fitted to all of them at once, its gates to the active one. Blocks before the
    first that leaves something out stay as they are.

    Args:
        dense: the model that it was converted from.
        sparse: converted, not trained.
        calibration: pyramids.
        ridge: pull towards the present weights.
        on_block: called after every block.
    """
    states, differs = _States(dense, sparse, calibration), False
    for index, (block, own) in enumerate(zip(dense.transformer.blocks, sparse.transformer.blocks, strict=True)):
        states.advance_dense(block)
        sublayers = len(block.residuals(block.context(states.prepared[0])))
        if differs:
            for layer in range(sublayers - 1):
                states.fit(own, layer, ridge)
        differs = differs or not _whole(own)
        if differs:
            start_gate(own, states.record(index))
            states.fit(own, sublayers - 1, ridge)
        states.advance(own)
        trim_memory()
        on_block()
    if differs:
        states.fit_head(dense, sparse, ridge)


def _whole(block: nn.Module) -> bool:
    """Whether every plan of the block runs all experts and computes all tokens at every scale."""
    ffn: ExpertFFN = inner(block).ffn
    return all(
        not plan.block_gated(ffn.index)
        and all(plan.runs_all(ffn.index, scale) for scale in range(len(plan.blocks[ffn.index].keep)))
        for plan in ffn.plans
    )
