"""The published token maps of Infinity: eight aspect ratios and their transposes, in four sizes.

Source: github.com/FoundationVision/Infinity, ``infinity/utils/dynamic_resolution.py`` (MIT). A ratio is height / width.
A smaller size is the beginning of the largest, and positions are those of the largest whatever size runs.
"""

from __future__ import annotations

from actvar_convert.errors import InputError
from actvar_convert.models.schedule import Schedule

Maps = tuple[tuple[int, int], ...]

_TALL: dict[float, str] = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}

SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Scales of every size; its name says the pixels of an image in millions."""


def _read(text: str) -> Maps:
    return tuple((int(h), int(w)) for h, _, w in (each.partition("x") for each in text.split()))


RATIOS: dict[float, Maps] = {ratio: _read(text) for ratio, text in _TALL.items()}
"""The maps of the largest size for every ratio, height / width."""
RATIOS |= {int(1 / ratio * 1000) / 1000: tuple((w, h) for h, w in maps) for ratio, maps in RATIOS.items() if ratio > 1}

_NEAR = 0.02
"""A finest map belongs to a ratio if its own is as near, relatively; the published ones are within 0.8 %."""


def published(name: str) -> Schedule:
    """The schedule of a name: a size (``1M``), or a size and a ratio height / width (``1M@0.75``).

    Raises:
        InputError: there is none of this name.
    """
    size, at, ratio = name.partition("@")
    size = "0.60M" if size == "0.6M" else size
    try:
        wanted = float(ratio) if at else 1.0
    except ValueError:
        wanted = 0.0
    found = [maps for known, maps in RATIOS.items() if abs(known - wanted) < 0.002]
    if size not in SIZES or not found:
        raise InputError(
            f"no schedule is called {name!r}. Give a size ({', '.join(SIZES)}), and behind @ a ratio height / width if "
            f"it is not 1: {', '.join(f'{each:g}' for each in sorted(RATIOS))}; such as 1M@0.75. Or give the maps: "
            f"[(1, 1), (2, 2), ...]."
        )
    return Schedule(found[0][: SIZES[size]])


def schedule_of(given: object) -> Schedule:
    """A schedule as a caller gives it: maps [(h, w), ...], or a name, see ``published``.

    Raises:
        InputError: it is none.
    """
    chosen = published(given) if isinstance(given, str) else Schedule.of(given)
    if chosen is None:
        raise InputError(f"a schedule is a list of maps [(height, width), ...] or a name; got {given!r}")
    return chosen


def largest(schedule: Schedule) -> tuple[int, int]:
    """The finest map (h, w) of the largest published size of a schedule's ratio: what positions are counted in.

    Raises:
        InputError: no published schedule has such a ratio.
    """
    h, w = schedule.maps[-1]
    ratio, maps = min(RATIOS.items(), key=lambda item: abs(item[0] * w / h - 1))
    if abs(ratio * w / h - 1) > _NEAR:
        raise InputError(
            f"no published schedule has the ratio of a map of {h} x {w} (height / width {h / w:.3g}), and positions "
            f"follow from it. Choose maps of a ratio of {', '.join(f'{each:g}' for each in sorted(RATIOS))}."
        )
    return maps[-1]
