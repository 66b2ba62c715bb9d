"""The condition of VAR: one class label an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from actvar_convert.errors import InputError
from actvar_convert.models.base import Entries


@dataclass(frozen=True)
class Labels(Entries):
    """Class indices [B] int64; ``nothing``, the index that stands for no class, is the number of classes."""

    @classmethod
    def of(cls, index_B: Tensor, classes: int) -> Labels:
        """The labels of a model of so many classes."""
        return cls(index_B, torch.tensor(classes))

    @classmethod
    def given(cls, labels: object, classes: int) -> Labels:
        """The labels that a caller gives: one whole number or several, of any integer type.

        Args:
            labels: a number, or a list, an array or a tensor [B] of them; -1 or ``classes`` for no class.

        Raises:
            InputError: numbers that are not whole, rows of them, or others than the model has classes.
        """
        allowed = f"whole numbers within 0 to {classes - 1}, or -1 for no class"
        try:
            found = labels.detach() if isinstance(labels, Tensor) else torch.from_numpy(_integers(np.array(labels)))
            if found.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch compares few of these
                found = torch.as_tensor(found.tolist(), dtype=torch.int64)
        except (OverflowError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"labels must be {allowed}") from error
        if found.ndim > 1:
            raise InputError(
                f"labels must be one number an image, got the shape {list(found.shape)}. Of one-hot rows give "
                "labels.argmax(-1)."
            )
        if found.numel() and (found.dtype == torch.bool or found.is_floating_point() or found.is_complex()):
            raise InputError(f"labels must be {allowed}; got numbers of the dtype {found.dtype}")
        index_B = found.to(torch.int64).flatten()
        index_B = torch.where(index_B == -1, classes, index_B)
        if len(index_B) and (int(index_B.min()) < 0 or int(index_B.max()) > classes):
            wrong = index_B[(index_B < 0) | (index_B > classes)][0]
            raise InputError(f"labels must be {allowed}; got {int(wrong)}")
        return cls.of(index_B, classes)

    def partly_null(self, every: int) -> Self:
        """Of labels that go round a multiple of ``every`` classes, others in every round."""
        place, classes = torch.arange(len(self)), int(self.nothing)
        if classes % every == 0:
            place += place // classes
        return self.dropped(place % every == 0)


def _integers(array: np.ndarray) -> np.ndarray:
    """Integers of any width and byte order as int64; other arrays as they are."""
    if array.dtype.kind not in "iu":
        return array
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
        raise OverflowError
    return array.astype(np.int64)
