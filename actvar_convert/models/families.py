"""The table of families. A further one is a folder beside this file and a line here."""

from __future__ import annotations

from actvar_convert.errors import CheckpointError
from actvar_convert.models.base import Family
from actvar_convert.models.var.family import VAR

FAMILIES: dict[str, Family] = {VAR.name: VAR}


def family_named(name: str) -> Family:
    """The family of a stored model.

    Raises:
        CheckpointError: this version knows no such family.
    """
    if name not in FAMILIES:
        raise CheckpointError(f"family {name!r} is unknown to this version, which has {', '.join(FAMILIES)}")
    return FAMILIES[name]
