"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from actvar_convert.errors import InputError

Given = TypeVar("Given")


def expanded(given: Given) -> Given | str:
    """A path or a name with ``~`` and ``~USER`` in front replaced by the home folder; else what is given.

    Only text is a path as somebody writes it: a ``Path`` stays as it is. ``./~`` is a folder of that name, and becomes
    absolute, so that it is not taken for the home folder later.

    Raises:
        InputError: no such user.
    """
    if not isinstance(given, str):
        return given
    if given.startswith(f".{os.sep}~"):
        return os.path.abspath(given)
    found = os.path.expanduser(given)
    if given.startswith("~") and found == given:
        user = given[1:].split(os.sep)[0]
        raise InputError(f"{given}: no user {user!r} on this machine. For a file of that name write .{os.sep}{given}.")
    return found


def path_of(given: str | os.PathLike[str]) -> Path:
    """The path that somebody means, see ``expanded``."""
    return Path(expanded(given))
