"""How tokens are drawn from logits: guidance's strength, filters, and the random numbers of a chunk of images.

Shapes: B images, L tokens of one scale, V codebook size.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        cfg: strength of classifier-free guidance; grows linearly from 0 at the first scale to this at the last.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens that together reach this probability; 0: all.
    """

    cfg: float = 1.5
    top_k: int = 0
    top_p: float = 0.0

    def strength(self, scale: int, num_scales: int) -> float:
        """Strength of guidance at one scale."""
        return self.cfg * scale / max(1, num_scales - 1)


def guided(logits_2BLV: Tensor, strength: float | Tensor) -> Tensor:
    """Guided predictions [B, L, V]: (1 + t) conditional - t unconditional (Ho and Salimans, arXiv 2207.12598).

    Args:
        logits_2BLV: B conditional rows, then the same without a class.
        strength: t, of all tokens or [L, 1].
    """
    conditional, unconditional = logits_2BLV.chunk(2)
    return (1 + strength) * conditional - strength * unconditional


def filter_logits(logits_BLV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside top-k and top-p at minus infinity (top-p after top-k, as the reference does).

    One sort serves both filters: the k-th largest logit is read from it.
    """
    kth = min(top_k, logits_BLV.shape[-1])
    if top_p <= 0:
        if top_k <= 0:
            return logits_BLV
        return logits_BLV.masked_fill(logits_BLV < logits_BLV.topk(kth, dim=-1).values[..., -1:], -torch.inf)
    ascending, order = logits_BLV.sort(dim=-1)
    if top_k > 0:
        ascending = ascending.masked_fill_(ascending < ascending[..., -kth, None], -torch.inf)
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    outside[..., -1] = False
    return logits_BLV.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def chunk_seed(seed: int, chunk_index: int) -> int:
    """Seed of the random numbers of one chunk of images; the first chunk uses ``seed`` itself."""
    if chunk_index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{chunk_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Noise:
    """The random numbers of one chunk of images: from one generator, scale by scale for the whole chunk.

    So the numbers of an image do not depend on which images are under way together. A generator on the CPU makes them
    one after the other (about 20 ns each); one on a GPU makes them all at once, but other ones, which also differ
    between kinds of GPU.

    Args:
        seed: of the chunk.
        images: in the chunk.
        keep: whether the numbers are wanted again, for other rows of the chunk: 4 L V bytes per image.
        device: of the generator and of the numbers.
    """

    def __init__(self, seed: int, images: int, *, keep: bool = False, device: torch.device | str = "cpu") -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._images, self._keep = images, keep
        self._kept: list[Tensor] = []

    def exponential(self, scale: int, length: int, vocab: int) -> Tensor:
        """Standard exponential numbers [images, length, vocab] fp32 of one scale; scales in order."""
        if scale < len(self._kept):
            return self._kept[scale]
        drawn = torch.empty(self._images, length, vocab, device=self._generator.device)
        drawn.exponential_(1, generator=self._generator)
        if self._keep:
            self._kept.append(drawn)
        return drawn


def draw(logits_BLV: Tensor, noise_BLV: Tensor) -> Tensor:
    """Tokens [B, L] drawn from the softmax of the logits by exponential noise.

    The largest quotient of probability and noise; ``torch.multinomial`` draws one sample in the same way and from the
    same numbers, but checks its input on the host first.
    """
    return F.softmax(logits_BLV, dim=-1).div_(noise_BLV.to(logits_BLV.device)).argmax(-1)


GOLDEN = (5**0.5 - 1) / 2
"""Multiples of this share, less their whole parts, lie evenly between 0 and 1 however many are taken."""


def balanced_labels(count: int, classes: int) -> Tensor:
    """Labels [count] int64 that go round the classes, so that every stretch of images is balanced.

    Where there are too few for every class, they lie spread over all of them, and so do the first of them alone: the
    classes of ImageNet are in order of kinship.
    """
    numbers = torch.arange(count)
    if count >= classes:
        return numbers % classes
    ranks = (numbers.double() * GOLDEN % 1).argsort().argsort()
    return ranks * classes // count
