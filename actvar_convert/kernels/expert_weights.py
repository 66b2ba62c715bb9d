"""The weights of an FFN that is split into experts.

Shapes: C width, H hidden neurons = E experts of N = H / E, expert e owning neurons e N to (e + 1) N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TRANSPOSED = (torch.float32, torch.bfloat16)
"""Dtypes in which a single expert on a CPU reads its columns of W2 from a transposed copy, in which they are rows.

oneDNN multiplies columns in place as it does rows, but only as a plain product; its fused operation, through which fp32
goes, falls back to one that is a thousand times slower. A prefix gains nothing by a copy (``fashion`` at its recipe's
plan, fp32, batch 1, 4 and 16: 55.6, 117.7 and 400.9 ms in place, 54.4, 115.9 and 417.7 ms from the copy; two cores), a
single expert does. The copy serves every expert, so it takes the memory of one W2 however many of them a plan has.
"""


class DerivedWeights:
    """Keeps the transpose of a weight for as long as that weight stays what it is.

    In inference mode alone: training changes weights at every step, and conversion writes to ``weight.data``, the one
    kind of change that torch does not count. A copy of it starts empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[_Source, Tensor] | None = None

    def transposed(self, weight: Tensor) -> Tensor | None:
        """The transpose, contiguous; None if a change to the weight could not be told."""
        if not torch.is_inference_mode_enabled() or weight.is_inference():
            return None
        if self._kept is None or not self._kept[0].is_of(weight):
            self._kept = _Source.at(weight), weight.t().contiguous()
        return self._kept[1]

    def __reduce__(self) -> tuple[type[DerivedWeights], tuple[()]]:
        return DerivedWeights, ()


class _Source(NamedTuple):
    """A weight at one time. The view keeps its memory from being given to a new weight at the same address."""

    view: Tensor
    version: int

    @classmethod
    def at(cls, weight: Tensor) -> _Source:
        return cls(weight.detach(), weight._version)

    def is_of(self, weight: Tensor) -> bool:
        own = self.view
        return (
            own.data_ptr() == weight.data_ptr()
            and own.dtype == weight.dtype
            and own.shape == weight.shape
            and self.version == weight._version
        )


class ExpertWeights(NamedTuple):
    """Weights of one FFN in expert order.

    Attributes:
        w1: [H, C]; b1: [H]; w2: [C, H]; b2: [C].
        experts: E.
        derived: what is kept of them from call to call; None: everything is derived anew.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    experts: int
    derived: DerivedWeights | None = None

    @property
    def neurons(self) -> int:
        """Neurons N of one expert."""
        return self.w1.shape[0] // self.experts

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The weights in another dtype."""
        w1, b1, w2, b2 = (tensor.to(dtype) for tensor in self[:4])
        return ExpertWeights(w1, b1, w2, b2, self.experts)

    def expert_columns(self, expert: int) -> Tensor:
        """W2 [C, N] of one expert."""
        begin, end = expert * self.neurons, (expert + 1) * self.neurons
        if self.derived is not None and self.w2.dtype in TRANSPOSED and self.experts > 1:
            w2_HC = self.derived.transposed(self.w2)
            if w2_HC is not None:
                return w2_HC[begin:end].t()
        return self.w2[:, begin:end]
