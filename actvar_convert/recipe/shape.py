"""What somebody knows of a dense model that its files do not tell: its shape, which of several weights are meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actvar_convert.errors import InputError


class Shape(BaseModel):
    """What a dense model's files may leave open; null: read from them, or the usual value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    heads: int | None = Field(None, ge=1, description="attention heads; null: as in the file, else width / 64")
    sides: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="side of every scale, coarse to fine; null: as in the file or as published"
    )
    residual_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the tokenizer's phi convolution in its output, which no tensor tells; null: 0.5",
    )
    using_znorm: bool | None = Field(
        None, description="whether the tokenizer compares codes by direction, which no tensor tells; null: it does not"
    )
    weights: str | None = Field(
        None,
        pattern="^[^,=]+$",
        description="which of several weights in a file, such as ema: the beginning of their names, or a part of it; "
        "null: those that were trained, not their average",
    )
    schedule: str | None = Field(
        None,
        pattern="^[^,=]+$",
        description="size of the images of an Infinity (0.06M, 0.25M, 0.60M, 1M pixels), and behind @ their ratio, "
        "height / width, if it is not 1: 0.25M@1.5; null: as published under the name of the file, else 1M",
    )

    @property
    def given(self) -> list[str]:
        """Names of what is not null."""
        return list(self.model_dump(exclude_none=True))

    @property
    def text(self) -> str:
        """What is not null as ``parse_shape`` reads it, such as ``heads=16,sides=1-2-3``."""
        values = self.model_dump(exclude_none=True)
        sides = "-".join(map(str, self.sides or ()))
        return ",".join(f"{name}={sides if name == 'sides' else value}" for name, value in values.items())


_ALLOWED = {
    "heads": "a whole number of at least 1",
    "sides": "one or more whole numbers of at least 1 (1-2-3-4 as text)",
    "residual_ratio": "a number within 0 to 1",
}

ShapeLike = Shape | Mapping[str, Any] | None
"""A shape as callers give it: as it is, or its values by name."""


def shape_of(given: ShapeLike) -> Shape:
    """The shape that a caller gives; None: nothing is known.

    Raises:
        InputError: a key or value that a shape does not have, all problems at once.
    """
    if isinstance(given, Shape):
        return given
    try:
        return Shape.model_validate(dict(given or {}))
    except ValidationError as error:
        names = dict.fromkeys(str(item["loc"][0]) for item in error.errors())
        problems = [
            f"{name}: given {dict(given or {}).get(name)!r}, allowed: {_ALLOWED[name]}"
            if name in _ALLOWED
            else f"{name}: unknown"
            for name in names
        ]
        raise InputError(f"this is no shape; it has {', '.join(Shape.model_fields)}:", problems) from error


def with_weights(given: ShapeLike, weights: str | None) -> Shape:
    """The shape that a caller gives, and which weights are meant if that is said apart from it.

    Raises:
        InputError: see ``shape_of``; or both name weights, and not the same.
    """
    shape = shape_of(given)
    if weights is None:
        return shape
    if shape.weights not in (None, weights):
        raise InputError(f"weights is given twice, as {weights!r} and in the shape as {shape.weights!r}; give one.")
    return shape_of({**shape.model_dump(exclude_none=True), "weights": weights})


def parse_shape(text: str) -> Shape:
    """The shape that a text such as ``heads=16,sides=1-2-3-4,residual_ratio=0.5`` says.

    Raises:
        InputError: see ``shape_of``; also a part that is no ``name=value``, or a name that comes twice.
    """
    parts = [part.partition("=") for part in text.split(",")] if text else []
    values = {name.strip(): value.strip() for name, _, value in parts}
    if not all(equals and name.strip() for name, equals, _ in parts):
        names = ", ".join(Shape.model_fields)
        raise InputError(f"{text!r} is no shape; it has {names}. Give name=value,..., such as heads=16,sides=1-2-3")
    if len(values) < len(parts):
        raise InputError(f"{text!r} names something twice; give every value once")
    sides = {"sides": values["sides"].split("-")} if "sides" in values else {}
    return shape_of(values | sides)
