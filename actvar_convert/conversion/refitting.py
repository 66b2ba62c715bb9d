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

import torch
from torch import Tensor, nn

from actvar_convert.conversion.activations import BlockRecord, States, first_states
from actvar_convert.conversion.experts import active_neurons
from actvar_convert.conversion.gates import start_gate
from actvar_convert.kernels.token_gate import take
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseBlock, SparseVARModel, SparseVARTransformer
from actvar_convert.models.var import Block, Span
from actvar_convert.system.device import release_pages

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
        assert self._layer.bias is not None
        self._layer.weight.add_(step[:, :-1].to(self._layer.weight.dtype))
        self._layer.bias.add_(step[:, -1].to(self._layer.bias.dtype))


class _Seen:
    """What passed through a block in one call.

    Attributes:
        joined: [B, K, C], what the heads found, at the input of the output projection; projected: at its output.
        ffn_input, ffn_output: [B, K, C] both.
    """

    joined: Tensor
    projected: Tensor
    ffn_input: Tensor
    ffn_output: Tensor


@contextmanager
def _watching(block: Block) -> Iterator[_Seen]:
    """Notes what passes through attention's projection and the FFN of a block."""
    seen, project = _Seen(), block.attn.project

    def projecting(x_BLC: Tensor) -> Tensor:
        seen.joined, seen.projected = x_BLC, project(x_BLC)
        return seen.projected

    def after_ffn(_: nn.Module, given: tuple[object, ...], output: Tensor) -> None:
        assert isinstance(given[0], Tensor)
        seen.ffn_input, seen.ffn_output = given[0], output

    handle = block.ffn.register_forward_hook(after_ffn)
    block.attn.project = projecting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del block.attn.project
        handle.remove()


class _Walk:
    """The calibration pyramids on their way through the dense model and, plan by plan, through the sparse one."""

    def __init__(self, dense: VARModel, sparse: SparseVARTransformer, tokens_PL: Tensor, labels_P: Tensor, batch: int):
        self.pyramid = dense.transformer.config.pyramid
        self.span = Span(0, self.pyramid.lengths)
        self.dense, self.conditions = first_states(dense, tokens_PL, labels_P, batch)
        self.mask = dense.transformer.attn_bias_for_masking.to(self.dense[0].dtype)
        self.between: list[Tensor] = []
        self.sparse = {name: list(self.dense) for name in sparse.plans}

    def advance_dense(self, block: Block) -> None:
        """Runs the dense block; ``between`` are the states after attention, ``dense`` those after the block."""
        self.between = []
        with _watching(block) as seen:
            for number, (x, condition) in enumerate(zip(self.dense, self.conditions, strict=True)):
                modulation = block.modulation(*condition)
                self.dense[number] = block(x, modulation, self.span, self.mask)
                self.between.append(torch.addcmul(x, seen.projected, modulation[:, 0].unsqueeze(1)))

    def record(self, block: SparseBlock) -> BlockRecord:
        """From what the sparse model has before a block to what the dense one has after it, under the active plan."""
        name = next(name for name, plan in block.ffn.plans.items() if plan == block.plan)
        states = [States(0, x, y) for x, y in zip(self.sparse[name], self.dense, strict=True)]
        return BlockRecord(block.index, states, [])

    def fit_projection(self, block: SparseBlock, ridge: float) -> None:
        """Moves attention's output projection towards the states between attention and FFN."""
        moments = _GatedMoments(block.attn.proj)
        for number, x, modulation, seen, rows in self._through(block):
            own = torch.addcmul(take(x, rows), seen.projected, modulation[:, 0].unsqueeze(1))
            moments.add(seen.joined, take(self.between[number], rows) - own, modulation[:, 0])
        moments.move(ridge)

    def fit_ffn(self, block: SparseBlock, ridge: float) -> None:
        """Moves the FFN's output weights towards the states after the block."""
        moments = _GatedMoments(block.ffn.fc2)
        for number, x, modulation, seen, rows in self._through(block):
            own = torch.addcmul(take(x, rows), seen.projected, modulation[:, 0].unsqueeze(1))
            own = torch.addcmul(own, seen.ffn_output, modulation[:, 1].unsqueeze(1))
            missing = take(self.dense[number], rows) - own
            counts = list(block.kept_counts(self.span))
            parts = zip(torch.split(seen.ffn_input, counts, 1), torch.split(missing, counts, 1), strict=True)
            for scale, (inputs, part) in enumerate(parts):
                if inputs.shape[1]:
                    hidden, runs = active_neurons(block.ffn, inputs, scale)
                    moments.add((hidden * runs.unsqueeze(-1)).flatten(2), part, modulation[:, 1])
        moments.move(ridge)

    def advance(self, block: SparseBlock) -> None:
        """Runs the sparse block under each of its plans."""
        for name, number, x, modulation in self._batches(block):
            self.sparse[name][number] = block(x, modulation, self.span, self.mask)

    def fit_head(self, dense: VARModel, sparse: SparseVARTransformer, ridge: float) -> None:
        """Moves the head towards the dense logits."""
        moments, head = _GatedMoments(sparse.head), dense.transformer.head_nm.ada_lin
        for states in self.sparse.values():
            for own, x, (condition, _) in zip(states, self.dense, self.conditions, strict=True):
                modulation = head(condition).view(-1, 2, x.shape[-1])
                missing = dense.transformer.logits(x, modulation) - sparse.logits(own, modulation)
                moments.add(sparse.head_nm(own, modulation), missing)
        moments.move(ridge)

    def _batches(self, block: SparseBlock) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """Plan, number, input and modulation of every batch, the plan being active meanwhile."""
        own = block.plan
        try:
            for name, plan in block.ffn.plans.items():
                block.plan = block.ffn.plan = plan
                for number, condition in enumerate(self.conditions):
                    yield name, number, self.sparse[name][number], block.modulation(*condition)
        finally:
            block.plan = block.ffn.plan = own

    def _through(self, block: SparseBlock) -> Iterator[tuple[int, Tensor, Tensor, _Seen, Tensor]]:
        """Number, input, modulation, what was seen, and the computed rows [B, K] of every batch, plan after plan."""
        with _watching(block) as seen:
            for _, number, x, modulation in self._batches(block):
                rows = block.computed_rows(x, self.span)
                if rows.shape[1]:  # under a plan that skips all tokens there is nothing to see
                    block(x, modulation, self.span, self.mask)
                    yield number, x, modulation, seen, rows


@torch.no_grad()
def refit_in_order(
    dense: VARModel,
    sparse: SparseVARModel,
    tokens_PL: Tensor,
    labels_P: Tensor,
    *,
    batch: int,
    ridge: float = RIDGE,
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Refits output projections, output weights, gates, reconstructions and head of a converted model, in place.

    A model that carries several plans is fitted to all of them at once, its gates to the active plan. Blocks before
    the first that leaves something out stay as they are.

    Args:
        dense: the model that it was converted from.
        sparse: converted, not trained.
        tokens_PL, labels_P: calibration pyramids and their classes.
        batch: pyramids per forward pass.
        ridge: pull towards the present weights.
        on_block: called after every block.
    """
    transformer, differs = sparse.transformer, False
    walk = _Walk(dense, transformer, tokens_PL, labels_P, batch)
    for block, own in zip(dense.transformer.layers, transformer.sparse_layers, strict=True):
        walk.advance_dense(block)
        if differs:
            walk.fit_projection(own, ridge)
        differs = differs or not _whole(own)
        if differs:
            start_gate(own, walk.record(own), walk.pyramid)
            walk.fit_ffn(own, ridge)
        walk.advance(own)
        release_pages(block.state_dict().values())
        on_block()
    if differs:
        walk.fit_head(dense, transformer, ridge)


def _whole(block: SparseBlock) -> bool:
    """Whether every plan of the block runs all experts and computes all tokens at every scale."""
    index, scales = block.index, range(len(block.config.sides))
    return all(
        not plan.block_gated(index) and all(plan.runs_all(index, scale) for scale in scales)
        for plan in block.ffn.plans.values()
    )
