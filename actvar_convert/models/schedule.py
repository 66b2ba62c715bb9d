"""The token maps of an image, scale by scale; free of torch, so that recipes are read without it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

from actvar_convert.plan import BackboneShape


@dataclass(frozen=True)
class Schedule:
    """The token maps of an image, coarse to fine: scale s is a map of ``maps[s]`` = (h, w) tokens, row by row.

    A one-dimensional level of n tokens is (n, 1).
    """

    maps: tuple[tuple[int, int], ...]

    @classmethod
    def of_sides(cls, sides: Sequence[int]) -> Schedule:
        """Square maps."""
        return cls(tuple((side, side) for side in sides))

    @classmethod
    def of(cls, given: object) -> Schedule | None:
        """Maps as a caller gives them, [(h, w), ...] or [side, ...]; None: they are no maps."""
        if isinstance(given, Schedule):
            return given
        try:
            pairs = [each if isinstance(each, Iterable) else (each, each) for each in given]  # type: ignore[attr-defined]
            maps = tuple((operator.index(h), operator.index(w)) for h, w in pairs)
        except (TypeError, ValueError):
            return None
        return cls(maps) if maps else None

    @property
    def num_scales(self) -> int:
        return len(self.maps)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(h * w for h, w in self.maps)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Index one past the last token of each scale in the flattened sequence."""
        return tuple(accumulate(self.lengths))

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Index of the first token of each scale in the flattened sequence."""
        return tuple(end - length for end, length in zip(self.ends, self.lengths, strict=True))

    @property
    def total(self) -> int:
        """Tokens of all scales together."""
        return self.ends[-1]

    def slice(self, scale: int) -> slice:
        """Positions of one scale in the flattened sequence."""
        return slice(self.begins[scale], self.ends[scale])

    def scales_in(self, tokens: int) -> int:
        """How many scales, from the first on, so many tokens make up.

        Raises:
            ValueError: they are no whole number of scales.
        """
        if tokens not in self.ends:
            raise ValueError(f"{tokens} tokens are no whole number of scales, which end at {self.ends}")
        return self.ends.index(tokens) + 1

    def span(self, scales: int | None = None) -> Span:
        """All tokens of the first ``scales`` scales, by default of all."""
        return Span(0, self.lengths[:scales])


class Span(NamedTuple):
    """Which tokens are in hand: ``counts[i]`` tokens of scale ``first + i``."""

    first: int
    counts: tuple[int, ...]

    @property
    def levels(self) -> list[int]:
        """The scale of every entry of ``counts``."""
        return list(range(self.first, self.first + len(self.counts)))


class Config(BackboneShape, Protocol):
    """The shape of a backbone, whatever else its family says of it."""

    @property
    def schedule(self) -> Schedule: ...
