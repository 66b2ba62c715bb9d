"""Shapes as callers give them: values, mappings, and the text of an option."""

from __future__ import annotations

import pytest

from actvar_convert.errors import InputError
from actvar_convert.recipe.shape import Shape, parse_shape, shape_of


@pytest.mark.parametrize("text", ["heads=16,sides=1-2-3-4,residual_ratio=0.5", "sides=4", "residual_ratio=0.0", ""])
def test_a_text_and_back(text: str) -> None:
    assert parse_shape(text).text == text


def test_mappings_and_values() -> None:
    known = Shape(heads=2, sides=(1, 2))
    assert shape_of(known) == shape_of({"heads": 2, "sides": [1, 2]}) == parse_shape(" heads = 2, sides=1-2")
    assert known.given == ["heads", "sides"] and shape_of(None) == Shape() and not Shape().given


@pytest.mark.parametrize("text", ["16", "heads", "heads=", "heads=x", "heads=0", "sides=1,2", "head=2", "sides=1-x"])
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="heads, sides, residual_ratio"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("=3", "'=3' is no shape"),
        ("heads", "'heads' is no shape"),
        ("heads=4,heads=8", "names something twice"),
        ("heads=x", "heads: given 'x', allowed: a whole number of at least 1"),
        ("sides=", "sides: given .*, allowed: one or more whole numbers"),
        ("colour=1", "colour: unknown"),
    ],
)
def test_a_text_that_is_no_shape_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_shape(text)
    assert "Input should" not in str(caught.value) and len(caught.value.problems) <= 1
