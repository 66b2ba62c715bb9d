"""The condition of VAR: one class label an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from actvar_convert.models.base import Entries


@dataclass(frozen=True)
class Labels(Entries):
    """Class indices [B] int64; ``nothing``, the index that stands for no class, is the number of classes."""

    @classmethod
    def of(cls, index_B: Tensor, classes: int) -> Labels:
        """The labels of a model of so many classes."""
        return cls(index_B, torch.tensor(classes))

    def partly_null(self, every: int) -> Self:
        """Of labels that go round a multiple of ``every`` classes, others in every round."""
        place, classes = torch.arange(len(self)), int(self.nothing)
        if classes % every == 0:
            place += place // classes
        return self.dropped(place % every == 0)
