"""config.json of older sparse folders, brought to the current format version one version at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from actvar_convert._version import __version__
from actvar_convert.errors import CheckpointError

FORMAT_VERSION = 2


def from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 did not name the family: VAR was the only one."""
    return {**content, "format_version": 2, "family": "var"}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: from_version_1}
"""For every older format version the function that makes the next version's config.json of it."""


def upgraded(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a sparse folder in the current format version.

    Args:
        path: config.json, for messages.
        content: what it holds.

    Raises:
        CheckpointError: its format version is no number, or newer than this package.
    """
    version = content.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{path} has format_version {version!r}, a whole number from 1 on was expected. Restore it."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this actvar-convert {__version__} reads up to {FORMAT_VERSION}. "
            "Upgrade actvar-convert."
        )
    for older in range(version, FORMAT_VERSION):
        content = UPGRADES[older](content)
    return content
