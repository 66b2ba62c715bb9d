"""What the environment says of a launcher (torchrun, accelerate launch, a pod's own): the one place that reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from actvar_convert.errors import InputError


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started together.

    Attributes:
        rank: its number, from 0. count: of all.
        local: its number on this machine; None: alone, or the launcher does not say.
        leftover: what the environment says of a rank without a launch, such as ``RANK=1``; it counts for nothing.
    """

    rank: int = 0
    count: int = 1
    local: int | None = None
    leftover: str = ""

    @property
    def first(self) -> bool:
        return self.rank == 0


def launched() -> Launch:
    """Who this process is. It is one of several if WORLD_SIZE says so; without that it is alone, whatever RANK says.

    Raises:
        InputError: WORLD_SIZE is no number, or one of several lacks a rank or an address to find the others by.
    """
    count = _number("WORLD_SIZE", 1, None) if os.environ.get("WORLD_SIZE") else 1
    if count == 1:
        rank = os.environ.get("RANK", "")
        return Launch(leftover="" if rank in ("", "0") else f"RANK={rank}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={count} says that this process is one of {count}, and {_either(missing)} not set. Start it "
            "under torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    _number("MASTER_PORT", 1, 2**16)
    local = _number("LOCAL_RANK", 0, None) if os.environ.get("LOCAL_RANK") else None
    return Launch(_number("RANK", 0, count), count, local)


def _number(name: str, least: int, end: int | None) -> int:
    """The whole number that a variable holds, from ``least`` to before ``end``."""
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdigit()) or int(text) < least or (end is not None and int(text) >= end):
        of = f"{least} or more" if end is None else f"{least} to {end - 1}"
        unset = name if name == "WORLD_SIZE" else f"{name} and WORLD_SIZE"
        raise InputError(
            f"{name}={os.environ[name]} in the environment: a launcher sets it to a whole number, {of}. Start the "
            f"command under torchrun or accelerate launch, or unset {unset}."
        )
    return int(text)


def _either(names: list[str]) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
