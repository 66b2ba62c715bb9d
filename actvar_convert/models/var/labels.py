"""The condition of VAR: one class label an image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """Class indices.

    Attributes:
        index: [B] int64.
        no_class: the index that stands for no class.
    """

    index: Tensor
    no_class: int

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: slice | Tensor) -> Self:
        return replace(self, index=self.index[index])

    def null(self) -> Self:
        return replace(self, index=torch.full_like(self.index, self.no_class))

    def dropped(self, where_B: Tensor) -> Self:
        return replace(self, index=self.index.masked_fill(where_B.to(self.index.device), self.no_class))

    def partly_null(self, every: int) -> Self:
        """Of labels that go round a multiple of ``every`` classes, others in every round."""
        place = torch.arange(len(self.index), device=self.index.device)
        if self.no_class % every == 0:
            place += place // self.no_class
        return self.dropped(place % every == 0)

    def joined(self, other: Self) -> Self:
        return replace(self, index=torch.cat((self.index, other.index)))

    def to(self, device: torch.device) -> Self:
        return replace(self, index=self.index.to(device))

    def copy_(self, other: Self) -> None:
        self.index.copy_(other.index)
