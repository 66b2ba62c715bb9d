"""Losses of both stages as small pure functions.

Shapes: B pyramids, L tokens, C width, V codebook, T tokens, F experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 over everything: 0 when equal, 1 for a student that says zero."""
    teacher = teacher.float()
    return (student.float() - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in units of the target's variance: 1 for a constant guess at the mean."""
    target = target.float()
    return F.mse_loss(prediction.float(), target) / target.var(correction=0).clamp_min(1e-12)


def kl_per_token(teacher_BLV: Tensor, student_BLV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) [B, L] in nats of the two softmaxes, times temperature squared (Hinton et al., 2015)."""
    teacher = F.log_softmax(teacher_BLV.float() / temperature, dim=-1)
    student = F.log_softmax(student_BLV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def weighted_mean(value_BL: Tensor, weight_L: Tensor | None) -> Tensor:
    """Mean over tokens, each weighted by its position's weight."""
    if weight_L is None:
        return value_BL.mean()
    return (value_BL * weight_L).sum() / (weight_L.sum() * len(value_BL))
