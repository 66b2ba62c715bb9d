"""Output weights that make up for the experts that rest: least squares on calibration tokens, nothing trained.

The neurons that a token runs tell something about those that it does not. With z(x) the hidden activations of the
active experts (zero elsewhere) and r(x) what the FFN loses by letting the others rest (their outputs less their
constants), both centred where constants can take up the mean,

    dW = argmin  sum over scales, plans and tokens of  v_s |r - dW z|^2  +  ridge |dW|^2,      W2' = W2 + dW

moves W2 for all scales at once. Scales that run every expert take part with r = 0, so they pull towards the old
weights; v_s lets a scale count by its number of tokens, however many were sampled. The cost of a token stays as it was.
The idea of a closed-form update after pruning is that of the Optimal Brain Surgeon (Hassibi and Stork, 1993).

Shapes: T tokens, C width, H neurons, E experts, F experts after the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from actvar_convert.conversion.experts import active_neurons
from actvar_convert.conversion.least_squares import CHUNK
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.plan import SparsityPlan

RIDGE = 0.1
"""Strength of the pull towards the dense weights, in units of the mean square of an active activation."""


class _Lost(NamedTuple):
    """Some tokens of one scale under the plan in force.

    Attributes:
        active: hidden activations [T, H], zero for neurons of experts that rest.
        lost: [T, C], outputs of the experts that rest less their constants.
        resting: [T], how many experts rest.
    """

    active: Tensor
    lost: Tensor
    resting: Tensor


@torch.no_grad()
def compensate(ffn: ExpertFFN, inputs: list[Tensor], *, centred: bool = True) -> None:
    """Fits the output weights of an expert FFN to what its dense one says, and shifts the constants to match.

    Args:
        ffn: with routers and constants in place; its weights are still the dense ones.
        inputs: FFN inputs [T_s, C] of every scale.
        centred: whether constants may take up the mean of what is lost; else they stay as they are. They do at the
            scales where the plan in force rests an expert per token or more: they are shared by all plans, and can
            make up for one.
    """
    if all(plan.runs_all(ffn.block, scale) for plan in ffn.plans.values() for scale in range(len(inputs))):
        return
    neurons, width = ffn.fc1.out_features, ffn.fc2.out_features
    gram = ffn.fc1.weight.new_zeros(neurons, neurons, dtype=torch.float32)
    cross = ffn.fc1.weight.new_zeros(neurons, width, dtype=torch.float32)
    own, shifted = ffn.plan, list[int]()
    in_force = next((name for name, plan in ffn.plans.items() if plan == own), None)
    try:
        for name, plan in ffn.plans.items():
            for scale, x in enumerate(inputs):
                if len(x):
                    weight = ffn.config.pyramid.lengths[scale] / len(x)
                    if _add(ffn, plan, x, scale, gram, cross, weight, centred and name == in_force):
                        shifted.append(scale)
        gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-9)
        step = torch.cholesky_solve(cross.double(), torch.linalg.cholesky(gram.double()))
        ffn.fc2.weight.add_(step.T.to(ffn.fc2.weight.dtype))
        for scale in shifted:
            _shift(ffn, own, inputs[scale], scale, step.float())
    finally:
        ffn.plan = own


def _add(
    ffn: ExpertFFN,
    plan: SparsityPlan,
    x_TC: Tensor,
    scale: int,
    gram: Tensor,
    cross: Tensor,
    weight: float,
    may_centre: bool,
) -> bool:
    """Adds the moments of one scale under one plan; says whether they were centred."""
    sum_z, sum_r, resting = gram.new_zeros(len(gram)), cross.new_zeros(cross.shape[1]), 0.0
    for active, lost, count in _under(ffn, plan, x_TC, scale):
        sum_z += active.sum(0)
        sum_r += lost.sum(0)
        resting += float(count.sum())
        gram.addmm_(active.T, active, alpha=weight)
        cross.addmm_(active.T, lost, alpha=weight)
    if not may_centre or resting < len(x_TC):
        return False
    gram.addr_(sum_z, sum_z, alpha=-weight / len(x_TC))
    cross.addr_(sum_z, sum_r, alpha=-weight / len(x_TC))
    return True


def _shift(ffn: ExpertFFN, plan: SparsityPlan, x_TC: Tensor, scale: int, step_HC: Tensor) -> None:
    """Shares the mean of what is still lost at one scale among the constants of the experts that rest there."""
    left, resting = step_HC.new_zeros(step_HC.shape[1]), step_HC.new_zeros(())
    for active, lost, count in _under(ffn, plan, x_TC, scale, step_HC):
        left += (lost - active @ step_HC).sum(0)
        resting += count.sum()
    prefix = plan.blocks[ffn.block].prefix[scale]
    ffn.inactive.data[scale, prefix:] += (left / resting).to(ffn.inactive.dtype)


def _under(
    ffn: ExpertFFN, plan: SparsityPlan, x_TC: Tensor, scale: int, step_HC: Tensor | None = None
) -> Iterator[_Lost]:
    """The tokens of one scale in pieces, under a plan; ``step_HC`` has been added to W2 already."""
    ffn.plan = plan
    weight = ffn.fc2.weight.float().T
    if step_HC is not None:
        weight = weight - step_HC
    for x in torch.split(x_TC, CHUNK):
        hidden, runs = (found.flatten(0, 1) for found in active_neurons(ffn, x.unsqueeze(0), scale))
        rests = (~runs).float()
        lost = (hidden * rests.unsqueeze(-1)).flatten(1) @ weight - rests @ ffn.inactive[scale].float()
        yield _Lost((hidden * runs.unsqueeze(-1)).flatten(1), lost, rests.sum(1))
