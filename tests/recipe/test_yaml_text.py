"""YAML with the value rules of version 1.2."""

from __future__ import annotations

import math

import pytest
import yaml

from actvar_convert.recipe.yaml_text import MAX_NESTING, MAX_VALUES, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("010", 10),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2020-01-01", "2020-01-01"),
        ("'1e-4'", "1e-4"),
        ("[1, 1e-3, a]", [1, 1e-3, "a"]),
        ("{a: {b: 2}}", {"a": {"b": 2}}),
    ],
)
def test_values(text: str, value: object) -> None:
    read = read_yaml(text)
    assert read == value and type(read) is type(value)


def test_infinity_and_nan_are_numbers() -> None:
    assert read_yaml("-.inf") == -math.inf
    assert math.isnan(read_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        ("a: [1, 2", "line 1, column"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: \x01", "special characters are not allowed"),
    ],
)
def test_what_is_not_yaml_is_said_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        read_yaml(text)


def test_aliases_that_multiply_are_refused_before_they_do() -> None:
    assert read_yaml("a: &x [1, 2]\nb: *x\nc: [*x, *x]") == {"a": [1, 2], "b": [1, 2], "c": [[1, 2], [1, 2]]}
    doubled = "".join(f"k{level}: &k{level} [*k{level - 1}, *k{level - 1}]\n" for level in range(1, 60))
    merged = "".join(f"k{n}: &k{n} {{!!merge <<: [*k{n - 1}, *k{n - 1}]}}\n" for n in range(1, 60))
    for text in ("k0: &k0 [1]\n" + doubled, "k0: &k0 {a: 1}\n" + merged):
        with pytest.raises(ValueError, match=f"line 1[78], .*more than {MAX_VALUES:,} values, aliases written out"):
            read_yaml(text)
    with pytest.raises(ValueError, match="an alias contains itself"):
        read_yaml("a: &a {b: [*a]}")


@pytest.mark.parametrize(
    "word", ["1e-4", "010", "no", "yes", "null", "", "1:30", "2020-01-01", "a: b", "# c", "grün", "1_0"]
)
def test_words_stay_words_for_both_versions_of_yaml(word: str) -> None:
    text = write_yaml({"a": word})
    assert read_yaml(text) == {"a": word} == yaml.safe_load(text)
    assert read_yaml(write_yaml(word, flow=True)) == word


def test_shared_values_are_written_out() -> None:
    shared = [1, 2]
    assert "&" not in write_yaml({"a": shared, "b": shared})


@pytest.mark.parametrize("kind", ["bool", "int", "float", "null"])
def test_a_kind_that_is_written_has_to_fit_its_text(kind: str) -> None:
    with pytest.raises(ValueError, match=f"line 2, column 4: this is no {kind}"):
        read_yaml(f"a: 1\nb: !!{kind} maybe")
    with pytest.raises(ValueError, match=f"line 1, column 4: this is no {kind}"):
        read_yaml(f"b: !!{kind} [1]")
    assert read_yaml("[!!bool True, !!int +3, !!float -.inf, !!null ~, !!str 1]") == [True, 3, float("-inf"), None, "1"]


@pytest.mark.parametrize("kind", ["timestamp x", "binary aGk=", "set {a}", "omap [a: 1]", "python/name:os.system"])
def test_kinds_beyond_yaml_1_2_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml(f"a: !!{kind}")


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 100_000, '{"a":' * 50_000, "? " * 50_000])
def test_deep_nesting_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_NESTING} levels of nesting"):
        read_yaml(text)


def test_long_texts_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="600,000 letters; at most 524,288 are read"):
        read_yaml("a" * 600_000)
