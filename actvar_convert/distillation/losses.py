"""Losses of both stages as small pure functions.

Where several processes share a batch, each loss is this process's share: ``total`` adds up over all of them what the
loss divides by, so the shares add up to the loss of the whole batch.

Shapes: B pyramids, L tokens, C width, V codebook, T tokens, F experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes that share a batch."""


LEAST_SPREAD = 1e-3
"""Share of a target's mean square that its variance has at least in a regression: targets may all be alike."""


def alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


def relative_error(
    student_BLC: Tensor, teacher_BLC: Tensor, total: Total = alone, weight_L: Tensor | None = None
) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 over everything: 0 when equal, 1 for a student that says zero.

    Both squared norms count every token by its position's weight.
    """
    teacher = teacher_BLC.float()
    error, size = (student_BLC.float() - teacher).square(), teacher.square()
    if weight_L is not None:
        error, size = error * weight_L.unsqueeze(-1), size * weight_L.unsqueeze(-1)
    return error.sum() / total(size.sum()).clamp_min(1e-12)


def regression(prediction: Tensor, target: Tensor, total: Total = alone) -> Tensor:
    """Mean squared error in units of the target's variance: 1 for a constant guess at the mean.

    A variance below ``LEAST_SPREAD`` of the target's mean square counts as that much.
    """
    target = target.float()
    sums = torch.stack((target.sum(), target.new_tensor(float(target.numel())), target.square().sum()))
    sum_, count, size = total(sums).unbind()
    spread = total((target - sum_ / count).square().sum())
    floor = (LEAST_SPREAD * size).clamp_min(1e-12)
    return (prediction.float() - target).square().sum() / torch.maximum(spread, floor)


def kl_per_token(teacher_BLV: Tensor, student_BLV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) [B, L] in nats of the two softmaxes, times temperature squared (Hinton et al., 2015)."""
    teacher = F.log_softmax(teacher_BLV.float() / temperature, dim=-1)
    student = F.log_softmax(student_BLV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def weighted_mean(value_BL: Tensor, weight_L: Tensor | None, total: Total = alone) -> Tensor:
    """Mean over tokens, each weighted by its position's weight; 0 where all weights are."""
    rows = total(value_BL.new_tensor(float(len(value_BL))))
    if weight_L is None:
        return value_BL.sum() / (rows * value_BL.shape[1])
    return (value_BL * weight_L).sum() / (weight_L.sum() * rows).clamp_min(1e-12)
