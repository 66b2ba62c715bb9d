"""The alphabets of token maps: one of V codes, or D bits; see ``base.Alphabet``.

Shapes: B images, L tokens, V codes, D bits; logits of bits are [B, L, 2 D], a pair (0, 1) for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.models.sampling import draw, filter_logits


@dataclass(frozen=True)
class Codes:
    """A token is one of V codes: [B, L] int64."""

    vocab: int

    @property
    def outcomes(self) -> tuple[int, ...]:
        return (self.vocab,)

    @property
    def width(self) -> int:
        return self.vocab

    @property
    def stored_bytes(self) -> int:
        return max(1, -(-(self.vocab - 1).bit_length() // 8))

    def draw(self, logits_BLV: Tensor, noise: Tensor, top_k: int, top_p: float) -> Tensor:
        return draw(filter_logits(logits_BLV, top_k, top_p), noise)

    def surprise(self, logits_BLV: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), tokens.flatten(), reduction="none").view_as(tokens)

    def divergence(self, teacher_BLV: Tensor, student_BLV: Tensor) -> Tensor:
        return _divergence(teacher_BLV, student_BLV)

    def agreement(self, teacher_BLV: Tensor, student_BLV: Tensor) -> Tensor:
        return (teacher_BLV.argmax(-1) == student_BLV.argmax(-1)).to(teacher_BLV.dtype)

    def pack(self, tokens: Tensor) -> Tensor:
        shifts = 8 * torch.arange(self.stored_bytes)
        return (tokens.cpu().unsqueeze(-1) >> shifts).bitwise_and(255).to(torch.uint8)

    def unpack(self, stored: Tensor) -> Tensor:
        shifts = 8 * torch.arange(self.stored_bytes)
        return (stored.long() << shifts).sum(-1)


@dataclass(frozen=True)
class Bits:
    """A token is D bits: [B, L, D] int64, 0 or 1 each, independent given the logits."""

    bits: int

    @property
    def outcomes(self) -> tuple[int, ...]:
        return (self.bits, 2)

    @property
    def width(self) -> int:
        return 2 * self.bits

    @property
    def stored_bytes(self) -> int:
        return -(-self.bits // 8)

    def _pairs(self, logits_BLV: Tensor) -> Tensor:
        return logits_BLV.view(*logits_BLV.shape[:-1], self.bits, 2)

    def draw(self, logits_BLV: Tensor, noise: Tensor, top_k: int, top_p: float) -> Tensor:
        return draw(filter_logits(self._pairs(logits_BLV), top_k, top_p), noise)

    def surprise(self, logits_BLV: Tensor, tokens: Tensor) -> Tensor:
        log_p = self._pairs(logits_BLV.float()).log_softmax(-1)
        return -log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).sum(-1)

    def divergence(self, teacher_BLV: Tensor, student_BLV: Tensor) -> Tensor:
        return _divergence(self._pairs(teacher_BLV), self._pairs(student_BLV)).sum(-1)

    def agreement(self, teacher_BLV: Tensor, student_BLV: Tensor) -> Tensor:
        same = self._pairs(teacher_BLV).argmax(-1) == self._pairs(student_BLV).argmax(-1)
        return same.to(teacher_BLV.dtype).mean(-1)

    def pack(self, tokens: Tensor) -> Tensor:
        padded = F.pad(tokens.cpu(), (0, 8 * self.stored_bytes - self.bits)).view(*tokens.shape[:-1], -1, 8)
        return (padded << torch.arange(8)).sum(-1).to(torch.uint8)

    def unpack(self, stored: Tensor) -> Tensor:
        spread = (stored.long().unsqueeze(-1) >> torch.arange(8)).bitwise_and(1)
        bits: Tensor = spread.flatten(-2)[..., : self.bits]
        return bits


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL over the last dimension, in nats."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
