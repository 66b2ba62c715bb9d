"""config.json of older sparse folders, brought to the current format version one version at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actvar_convert._version import __version__
from actvar_convert.errors import CheckpointError

FORMAT_VERSION = 2


KEPT: dict[str, object] = {
    "reconstruction": "mixture",
    "skipped_kv": "dropped",
    "neighbourhood": 1,
    "router_width": 0,
    "threshold": None,
    "mean_routed": None,
}
"""Settings that plans of version 1 or their blocks had besides, and the value that became the rule."""

OF_GATES = ("reconstruction", "skipped_kv")
"""Those that say nothing if a plan skips no tokens."""


def from_version_1(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 did not name the family, VAR was the only one; and its plans had the settings in ``KEPT``.

    Raises:
        CheckpointError: a plan has another value than the kept one.
    """
    for _, plan in _of_plans(content):
        if "blocks" in plan:
            plan.setdefault("skipped_kv", "computed")
            if not _gated(plan):
                plan |= {key: KEPT[key] for key in OF_GATES}
    problems = [
        f"{where}.{key} is {values[key]!r}, allowed: {KEPT[key]!r}"
        for where, values in _of_plans(content)
        for key in KEPT.keys() & values.keys()
        if values[key] != KEPT[key]
    ]
    if problems:
        raise CheckpointError(
            f"{path} uses settings that are no longer there. actvar-convert 0.1 reads it; or convert again:",
            sorted(problems),
        )
    for _, values in _of_plans(content):
        for key in KEPT.keys() & values.keys():
            del values[key]
    return {**content, "format_version": 2, "family": "var"}


def _gated(plan: dict[str, Any]) -> bool:
    """Whether a plan skips tokens in any block."""
    blocks = plan["blocks"] if isinstance(plan["blocks"], list) else []
    keeps = [block.get("keep") for block in blocks if isinstance(block, dict)]
    return any(keep != [1.0] * len(keep) for keep in keeps if isinstance(keep, list))


def _of_plans(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Plans and their blocks as they stand in a configuration, each with its dotted path; what is none is left out."""
    plans = content.get("plans")
    for name, plan in plans.items() if isinstance(plans, dict) else ():
        if isinstance(plan, dict):
            yield f"plans.{name}", plan
            blocks = plan.get("blocks")
            for index, block in enumerate(blocks if isinstance(blocks, list) else ()):
                if isinstance(block, dict):
                    yield f"plans.{name}.blocks.{index}", block


UPGRADES: dict[int, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {1: from_version_1}
"""For every older format version the function that makes the next version's config.json of it."""


def upgraded(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a sparse folder in the current format version.

    Args:
        path: config.json, for messages.
        content: what it holds.

    Raises:
        CheckpointError: its format version is no number, newer than this package, or a setting is no longer there.
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
        content = UPGRADES[older](path, content)
    return content
