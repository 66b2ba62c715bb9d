"""The settings of a recipe as data, read off the schema: dotted path, meaning, what is allowed, nearest valid name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from actvar_convert.recipe.schema import Recipe

ANY_NAME = "NAME"
"""Stands in paths for a key that the writer of the recipe chooses (the name of a plan)."""

ANY_INDEX = "N"
"""Stands in paths for the number of an entry of a list, from 0."""

_KINDS: dict[object, tuple[str, str]] = {
    bool: ("true or false", "true or false values"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted path, its field, and the sections inside it (None: it is a single value)."""

    path: str
    info: FieldInfo
    section: type[BaseModel] | None

    @property
    def allowed(self) -> str:
        """Type and range in words."""
        return allowed(self.info)


def settings(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """All settings below a section, depth first, sections before what they hold."""
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        inner, between = _inner(info.annotation)
        yield Setting(path, info, inner)
        if inner is not None:
            yield from settings(inner, ".".join([path, *between, ""]))


def find(path: Sequence[str | int]) -> Setting | None:
    """The setting at a path; a path to an entry of a plain list finds the list. None: there is no such setting."""
    section: type[BaseModel] | None = Recipe
    found: Setting | None = None
    rest = list(path)
    while rest and section is not None:
        name = str(rest.pop(0))
        if name not in section.model_fields:
            return None
        info = section.model_fields[name]
        section, between = _inner(info.annotation)
        found = Setting(".".join(str(part) for part in path[: len(path) - len(rest)]), info, section)
        rest = rest[len(between) :]
    return found if all(isinstance(part, int) for part in rest) else None


def nearest(path: Sequence[str | int]) -> str | None:
    """The valid path that somebody who wrote this one most likely meant; of a bare name all that end with it."""
    *parents, last = path
    parent, name = find(parents), str(last)
    section = Recipe if not parents else parent.section if parent else None
    if section is None and parent is not None:
        return parent.path
    everything = [setting.path for setting in settings()]
    same = [known for known in everything if known.rsplit(".", 1)[-1] == name]
    if not parents and same:
        return " or ".join(same)
    if section is not None and not same:
        close = difflib.get_close_matches(name, list(section.model_fields), 1)
        if close:
            return ".".join(str(part) for part in [*parents, close[0]])
    whole = ".".join(str(part) for part in path)
    return next(iter(difflib.get_close_matches(whole, same or everything, 1, 0.0 if same else 0.7)), None)


def allowed(info: FieldInfo) -> str:
    """What a field accepts, in words: ``a whole number of at least 1, or null``."""
    return _phrase(info.annotation, info.metadata)


def _inner(annotation: Any) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that an annotation leads into, and the name or index that stands between, if any."""
    kind, _, _ = _unwrap(annotation)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind, []
    if get_origin(kind) is dict:
        return _inner(get_args(kind)[1])[0], [ANY_NAME]
    if get_origin(kind) is tuple:
        return _inner(get_args(kind)[0])[0], [ANY_INDEX]
    return None, []


def _unwrap(annotation: Any) -> tuple[Any, list[Any], bool]:
    """An annotation without ``Annotated`` and ``| None``: its kind, its constraints, whether null is allowed."""
    constraints: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            constraints += item.metadata if isinstance(item, FieldInfo) else [item]
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        if len(options) < len(get_args(annotation)):
            kind, more, _ = _unwrap(options[0])
            return kind, constraints + more, True
    return annotation, constraints, False


def _phrase(annotation: Any, metadata: Sequence[Any]) -> str:
    kind, constraints, null = _unwrap(annotation)
    constraints = [*constraints, *metadata]
    origin = get_origin(kind)
    if origin is Literal:
        text = "one of " + ", ".join(str(option) for option in get_args(kind))
    elif origin is tuple:
        item, more, _ = _unwrap(get_args(kind)[0])
        text = "a list of " + _plural(item) + _range(more) + _count(constraints)
    elif origin is dict:
        text = "a section with a name of your choice for each entry"
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        text = f"a section with the keys {', '.join(kind.model_fields)}"
    else:
        text = _KINDS[kind][0] + _range(constraints)
    return text + (", or null" if null else "")


def _plural(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "any of " + ", ".join(str(option) for option in get_args(kind))
    return _KINDS[kind][1] if kind in _KINDS else "sections"


def _bound(constraints: Sequence[Any], name: str) -> Any:
    return next((getattr(item, name) for item in constraints if getattr(item, name, None) is not None), None)


def _range(constraints: Sequence[Any]) -> str:
    ge, gt, le, lt = (_bound(constraints, name) for name in ("ge", "gt", "le", "lt"))
    low = f"at least {ge}" if ge is not None else f"more than {gt}" if gt is not None else ""
    high = f"at most {le}" if le is not None else f"less than {lt}" if lt is not None else ""
    text = f" of {' and '.join(part for part in (low, high) if part)}" if low or high else ""
    if _bound(constraints, "pattern") is not None:
        text += " of letters, digits, '.', '_' and '-', beginning with a letter or digit"
    if not text and _bound(constraints, "min_length") is not None:
        text = ", not empty"
    return text


def _count(constraints: Sequence[Any]) -> str:
    least = _bound(constraints, "min_length")
    return f", {least} or more" if least is not None else ""
