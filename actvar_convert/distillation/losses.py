"""Losses of both stages as small pure functions.

Every loss takes the weights [B, L] of its tokens; None: all 1. If several processes share a batch, each loss is this
process's share: ``total`` adds up over all of them what the loss divides by, so the shares add up to the loss of the
whole batch.

Shapes: B pyramids, L tokens, C width, V codebook, F experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from actvar_convert.models.base import Alphabet

Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes that share a batch."""

LEAST_SPREAD = 1e-3
"""Share of a target's mean square that its variance has at least in a regression: targets may all be alike."""


def alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


def relative_error(
    student_BLC: Tensor, teacher_BLC: Tensor, weights_BL: Tensor | None = None, total: Total = alone
) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 over everything: 0 when equal, 1 for a student that says zero.

    Both squared norms count every token by its weight.
    """
    teacher = teacher_BLC.float()
    error, size = (student_BLC.float() - teacher).square(), teacher.square()
    return _weighted(error, weights_BL).sum() / total(_weighted(size, weights_BL).sum()).clamp_min(1e-12)


def regression(prediction: Tensor, target: Tensor, weights_BL: Tensor | None = None, total: Total = alone) -> Tensor:
    """Mean squared error in units of the target's variance: 1 for a constant guess at the mean.

    A variance below ``LEAST_SPREAD`` of the target's mean square counts as that much.

    Args:
        prediction, target: [B, L], or [B, L, F] if a token has several.
    """
    target = target.float()
    count = target.new_tensor(float(target.numel()))
    if weights_BL is not None:
        count = _weighted(torch.ones_like(target), weights_BL).sum()
    sums = torch.stack((_weighted(target, weights_BL).sum(), count, _weighted(target.square(), weights_BL).sum()))
    sum_, count, size = total(sums).unbind()
    mean = sum_ / count.clamp_min(1e-12)
    spread = total(_weighted((target - mean).square(), weights_BL).sum())
    floor = (LEAST_SPREAD * size).clamp_min(1e-12)
    return _weighted((prediction.float() - target).square(), weights_BL).sum() / torch.maximum(spread, floor)


def kl(
    alphabet: Alphabet,
    teacher_BLV: Tensor,
    student_BLV: Tensor,
    weights_BL: Tensor | None = None,
    total: Total = alone,
) -> Tensor:
    """Mean KL(teacher || student) of the tokens, in nats."""
    return weighted_mean(alphabet.divergence(teacher_BLV.float(), student_BLV.float()), weights_BL, total)


def weighted_mean(value_BL: Tensor, weights_BL: Tensor | None = None, total: Total = alone) -> Tensor:
    """Mean over tokens by their weights; 0 if all weights are."""
    if weights_BL is None:
        return value_BL.sum() / total(value_BL.new_tensor(float(value_BL.numel())))
    return (value_BL * weights_BL).sum() / total(weights_BL.sum()).clamp_min(1e-12)


def _weighted(value: Tensor, weights: Tensor | None) -> Tensor:
    """Values [B, L, ...], each by its token's weight."""
    return value if weights is None else value * weights.reshape(*weights.shape, *(1,) * (value.ndim - weights.ndim))
