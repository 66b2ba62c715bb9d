"""The published models of all families: names, shapes, and their files on the hub."""

from __future__ import annotations

from typing import Any, NamedTuple

from actvar_convert.errors import InputError
from actvar_convert.files import infinity, layout
from actvar_convert.models.families import family_of
from actvar_convert.recipe.shape import Shape

TOKENIZER_FILE = "vae_ch160v4096z32.pth"
"""Of all published VARs."""


class Files(NamedTuple):
    """Where the weights of a published model lie.

    Attributes:
        repository: on the hub.
        weights: file there; a folder of shards ends in a slash.
        vae: file of its tokenizer.
    """

    repository: str
    weights: str
    vae: str


def official_names() -> tuple[str, ...]:
    """Names of the published models."""
    return (*layout.official_names(), *infinity.PUBLISHED)


def official_config(name: str, shape: Shape | None = None) -> tuple[Any, Any]:
    """Shapes of a published model and of its tokenizer; needs neither weights nor network.

    Raises:
        InputError: no published model has this name, or it has no such schedule.
    """
    if name not in official_names():
        raise InputError(f"no published model is called {name!r}; there are {', '.join(official_names())}.")
    made: tuple[Any, Any] = (
        infinity.PUBLISHED[name].configs() if name in infinity.PUBLISHED else layout.official_config(name)
    )
    if shape is None or shape.schedule is None:
        return made
    return family_of(made[0]).at(*made, shape.schedule)


def official_files(name: str) -> Files:
    """Where its files lie."""
    if name in infinity.PUBLISHED:
        known = infinity.PUBLISHED[name]
        return Files(infinity.REPOSITORY, known.weights, known.vae)
    return Files("FoundationVision/var", name.replace("-", "_") + ".pth", TOKENIZER_FILE)
