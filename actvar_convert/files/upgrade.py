"""config.json and tensors of older sparse folders, brought to the current format version one version at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from actvar_convert._version import __version__
from actvar_convert.errors import CheckpointError
from actvar_convert.files.contents import Contents
from actvar_convert.recipe.removed import drop_removed
from actvar_convert.recipe.shape import Shape

FORMAT_VERSION = 2


class Outdated(CheckpointError):
    """A folder that is whole, and that this version cannot read; to restore it would not help."""


def from_version_1(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 did not name the family, VAR was the only one; and its plans had settings that are gone;
    what was given of a source's shape stood in the provenance itself.

    Raises:
        Outdated: a plan has another value than the kept one.
    """
    problems = drop_removed(content, "plans.")
    if problems:
        raise Outdated(
            f"{path} uses settings that are no longer there. actvar-convert 0.1 reads it; or convert again:", problems
        )
    recorded = content.get("provenance")
    if isinstance(recorded, dict):
        shape = {name: recorded.pop(name) for name in Shape.model_fields if recorded.get(name) is not None}
        content["provenance"] = recorded | ({"shape": shape} if shape else {})
    content.pop("sha256", None)
    return {**content, "format_version": 2, "family": "var"}


def upgraded_tensors(folder: Path, contents: Contents) -> dict[str, Tensor]:
    """The tensors of a transformer without ``ffn.inactive``, constants that inactive experts added in version 1.

    Raises:
        Outdated: such constants are not zero.
    """
    constants = {name: tensor for name, tensor in contents.tensors.items() if name.endswith(".ffn.inactive")}
    if any(bool(value.any()) for _, value in contents.each(constants)):
        raise Outdated(
            f"{folder} uses a setting that is no longer there. actvar-convert 0.1 reads it; or convert again:",
            ["experts.inactive: inactive experts add constants here, and nothing today"],
        )
    return {name: tensor for name, tensor in contents.tensors.items() if name not in constants}


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
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{path} has format_version {version!r}, a whole number from 1 on was expected. Restore it."
        )
    if version > FORMAT_VERSION:
        raise Outdated(
            f"{path} has format version {version}; this actvar-convert {__version__} reads up to {FORMAT_VERSION}. "
            "Upgrade actvar-convert."
        )
    for older in range(version, FORMAT_VERSION):
        content = UPGRADES[older](path, content)
    return content
