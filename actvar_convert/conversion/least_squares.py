"""Linear maps fitted to calibration tokens, from moments that are added up chunk by chunk in fp64.

Shapes: T tokens, C inputs, D outputs, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1024
"""Tokens converted to fp64 at once."""


class Moments:
    """Sums over tokens that every least-squares fit of y [T, D] to x [T, C] can be computed from.

    Attributes:
        count: tokens T.
        sum_x, sum_y: [C] and [D]; gram: x' x [C, C]; cross: x' y [C, D]; all fp64.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.count = 0
        self.sum_x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.sum_y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, x_TC: Tensor, y_TD: Tensor) -> Moments:
        """The moments of these tokens."""
        moments = cls(x_TC.shape[1], y_TD.shape[1], x_TC.device)
        moments.add(x_TC, y_TD)
        return moments

    def add(self, x_TC: Tensor, y_TD: Tensor) -> None:
        """Adds tokens."""
        for x, y in zip(torch.split(x_TC, CHUNK), torch.split(y_TD, CHUNK), strict=True):
            x, y = x.double(), y.double()
            self.count += len(x)
            self.sum_x += x.sum(0)
            self.sum_y += y.sum(0)
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(x.T, y)

    def columns(self, chosen: slice) -> Moments:
        """The moments of some of the outputs."""
        part = Moments(0, 0, self.gram.device)
        part.count, part.sum_x, part.gram = self.count, self.sum_x, self.gram
        part.sum_y, part.cross = self.sum_y[chosen], self.cross[:, chosen]
        return part

    def ridge(self, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Weight [D, C] and bias [D], fp64, of y = W x + b with a little ridge on W."""
        mean_x, mean_y = self.sum_x / self.count, self.sum_y / self.count
        gram = _regular(self.gram - self.count * torch.outer(mean_x, mean_x), strength)
        weight = torch.linalg.solve(gram, self.cross - self.count * torch.outer(mean_x, mean_y)).T
        return weight, mean_y - weight @ mean_x

    def reduced_rank(self, rank: int, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
        """A [r, C] and B [D, r], fp64, of the best rank-r map y = B A x (reduced-rank regression)."""
        gram = _regular(self.gram, strength)
        full = torch.linalg.solve(gram, self.cross)
        _, vectors = torch.linalg.eigh(full.T @ gram @ full)
        basis = vectors[:, -rank:] if rank else vectors[:, :0]
        return (full @ basis).T, basis


def _regular(gram: Tensor, strength: float) -> Tensor:
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device).mul_(
        strength * gram.diagonal().mean() + 1e-9
    )


def ridge(x_TC: Tensor, y_TD: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight [D, C] and bias [D] of the least-squares map from x to y, with a little ridge, solved in fp64."""
    weight, bias = Moments.of(x_TC, y_TD).ridge(strength)
    return weight.to(y_TD.dtype), bias.to(y_TD.dtype)


def reduced_rank(x_TC: Tensor, y_TD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, C] and B [D, r] of the best rank-r map y = B A x in the least-squares sense."""
    down, up = Moments.of(x_TC, y_TD).reduced_rank(rank)
    return down.to(x_TC.dtype), up.to(x_TC.dtype)
