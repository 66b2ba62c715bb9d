"""How tokens are sampled from logits: guidance's strength, filters, and the random numbers of a chunk of images.

Shapes: B images, L tokens of one scale, V codebook size.
"""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.errors import InputError


def whole_number(name: str, given: object, least: int | None = None, end: int | None = None) -> int:
    """A whole number of any integer type (Python's, NumPy's, a tensor's), from ``least`` to before ``end``.

    Raises:
        InputError: another kind of value, or out of range; the message begins with the name.
    """
    boolean = isinstance(given, bool | np.bool_) or getattr(given, "dtype", None) == torch.bool
    try:
        value = None if boolean else operator.index(given)  # type: ignore[arg-type]
    except TypeError:
        value = None
    if value is None or (least is not None and value < least) or (end is not None and value >= end):
        within = "" if least is None else f" of at least {least}" if end is None else f" within {least} to {end - 1}"
        raise InputError(f"{name} must be a whole number{within}, got {given!r}")
    return value


def whole_numbers(name: str, given: Any, least: int | None = None, end: int | None = None) -> list[int]:
    """The same of one number or several."""
    try:
        several = list(given)
    except TypeError:
        several = [given]
    return [whole_number(name, each, least, end) for each in several]


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

    def exponential(self, scale: int, length: int, outcomes: tuple[int, ...]) -> Tensor:
        """Standard exponential numbers [images, length, *outcomes] fp32 of one scale; scales in order."""
        if scale < len(self._kept):
            return self._kept[scale]
        drawn = torch.empty(self._images, length, *outcomes, device=self._generator.device)
        drawn.exponential_(1, generator=self._generator)
        if self._keep:
            self._kept.append(drawn)
        return drawn


def draw(logits_BLV: Tensor, noise_BLV: Tensor) -> Tensor:
    """Tokens [B, L] sampled from the softmax of the logits by exponential noise.

    The largest quotient of probability and noise; ``torch.multinomial`` takes one sample by the same rule and from the
    same numbers, but checks its input on the host first.
    """
    return F.softmax(logits_BLV, dim=-1).div_(noise_BLV.to(logits_BLV.device)).argmax(-1)


GOLDEN = (5**0.5 - 1) / 2
"""Multiples of this share, less their whole parts, lie evenly between 0 and 1 however many are taken."""


def balanced_labels(count: int, classes: int) -> Tensor:
    """Labels [count] int64 that go round the classes, so that every stretch of images is balanced.

    If there are too few for every class, they lie spread over all of them, and so do the first of them alone: the
    classes of ImageNet are in order of kinship.
    """
    numbers = torch.arange(count)
    if count >= classes:
        return numbers % classes
    ranks = (numbers.double() * GOLDEN % 1).argsort().argsort()
    return ranks * classes // count
