"""The table of families. A further one is a folder beside this file and a line here."""

from __future__ import annotations

from actvar_convert.errors import InputError
from actvar_convert.models.base import Family
from actvar_convert.models.infinity.family import INFINITY
from actvar_convert.models.var.family import VAR

FAMILIES: dict[str, Family] = {VAR.name: VAR, INFINITY.name: INFINITY}


def logits_of(config: object) -> int:
    """Logits V of one token."""
    return family_of(config).alphabet(config).width


def family_of(config: object) -> Family:
    """The family whose backbones, or tokenizers, have such a configuration.

    Raises:
        InputError: none of the table.
    """
    for family in FAMILIES.values():
        if isinstance(config, family.config_type | family.tokenizer_config_type):
            return family
    raise InputError(f"no family has a configuration of type {type(config).__name__}; it has {', '.join(FAMILIES)}")
