"""Recipe name or file and overrides in, one validated recipe out, or all problems at once."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from actvar_convert.errors import InputError, RecipeError
from actvar_convert.models.schedule import Config
from actvar_convert.recipe.check import problems_for
from actvar_convert.recipe.fields import allowed, find, nearest
from actvar_convert.recipe.removed import drop_removed, replacement
from actvar_convert.recipe.schema import Recipe
from actvar_convert.recipe.shipped import shipped_recipes
from actvar_convert.recipe.yaml_text import read_yaml, write_yaml
from actvar_convert.system.paths import expanded

RecipeSource = str | os.PathLike[str] | Recipe
ConfigSource = Config | Callable[[Recipe], Config]
Place = tuple[str | int, ...]


def load_recipe(source: RecipeSource, overrides: Sequence[str] = (), *, config: ConfigSource | None = None) -> Recipe:
    """A recipe with its overrides, complete and checked.

    Args:
        source: name of a shipped recipe, a YAML file, a folder with a ``recipe.yaml``, or a recipe. From the recipe of
            a sparse folder in format version 1, settings that are gone are dropped if they have the kept value.
        overrides: ``path=value`` each, such as ``distill.stage2.steps=500``; the value is read as YAML.
        config: shape of the dense model, or a function that finds it for a recipe (by its ``model``), so that what
            does not fit the model is reported together with everything else.

    Raises:
        RecipeError: the recipe cannot be read, or is wrong; all problems at once, each with its dotted path, what was
            given, what is allowed and the nearest valid name.
    """
    where, data = _read(source)
    problems = [problem for text in overrides if (problem := _override(data, text))]
    recipe, wrong, sound = _validate(data)
    problems += wrong
    if recipe is not None:
        problems += _misfits(recipe, config if sound or not callable(config) else None)
    if problems or recipe is None:
        raise RecipeError(f"recipe {where}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems)
    return recipe


def dump_recipe(recipe: Recipe, *, explain: bool = False) -> str:
    """The recipe as YAML with all defaults written out; ``load_recipe`` reads it back as the same recipe.

    Args:
        recipe: the recipe.
        explain: put the meaning and the range of every setting above it.
    """
    data = recipe.model_dump(mode="json")
    return "".join(_explained(recipe, "")) if explain else write_yaml(data)


def _explained(section: BaseModel, indent: str) -> list[str]:
    lines = []
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += [f"{indent}# {info.description}\n{indent}{name}:\n", *_explained(value, indent + "  ")]
            continue
        plain = section.model_dump(mode="json", include={name})[name]
        lines.append(f"{indent}# {info.description} ({allowed(info)})\n")
        lines.append(f"{indent}{name}: {write_yaml(plain, flow=True)}\n")
    return lines


def _read(source: RecipeSource) -> tuple[str, dict[str, Any]]:
    """What the source is called, and its content."""
    if isinstance(source, Recipe):
        return repr(source.name), source.model_dump(mode="json")
    source = expanded(source)
    name, path = os.fspath(source), Path(source)
    shipped = shipped_recipes()
    if isinstance(source, str) and name in shipped:
        where, text = repr(name), shipped[name].read_text(encoding="utf-8")
    else:
        if path.is_dir():
            if not (path / "recipe.yaml").exists():
                raise RecipeError(f"{path} is a folder without a recipe.yaml; give a YAML file, or a sparse folder")
            path = path / "recipe.yaml"
        elif path.exists() and not path.is_file():
            raise RecipeError(f"{path} is no file; give a YAML file, or the name of a shipped recipe")
        if not path.is_file() and path.suffix not in (".yaml", ".yml"):
            close = difflib.get_close_matches(name, list(shipped), 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RecipeError(
                f"recipe {name!r} is neither shipped nor a file: {hint}shipped are {', '.join(shipped)}; "
                "a file of your own ends in .yaml"
            )
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise RecipeError(f"recipe {path} cannot be read: {reason}") from error
    try:
        data = read_yaml(text)
        json.dumps(data, ensure_ascii=False).encode()  # half of a letter cannot be
    except (ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"recipe {where} is not a valid YAML file: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"recipe {where} holds {_shown(data)} where a section with keys such as name and model belongs"
        )
    data = copy.deepcopy(data)
    if _of_version_1(path):
        changed = drop_removed(data)
        if changed:
            raise RecipeError(
                f"recipe {where} uses settings that are no longer there. actvar-convert 0.1 reads it:", changed
            )
    return where, data


def _of_version_1(path: Path) -> bool:
    """Whether a recipe is part of a sparse folder in format version 1."""
    try:
        content = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return path.name == "recipe.yaml" and isinstance(content, dict) and content.get("format_version") == 1


def _override(data: dict[str, Any], text: str) -> str | None:
    """Puts one ``path=value`` into the data; returns the problem if it cannot be."""
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not key.strip():
        return f"--set {text}: give it as path=value, such as distill.stage2.steps=500"
    if find(parts) is None:
        return f"{key.strip()}: {_unknown(parts, 'setting')}"
    try:
        value = read_yaml(raw)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, TypeError) as error:
        return f"{key.strip()}: the value {raw!r} is not valid YAML: {error}"
    node: Any = data
    for part in parts[:-1]:
        child = _child(node, part)
        if child is None and isinstance(node, dict):
            child = node[part] = {}
        node = child
    last = parts[-1]
    if isinstance(node, dict):
        node[last] = value
    elif isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = value
    else:
        return f"{key.strip()}: there is no such entry in the recipe"
    return None


def _child(node: Any, part: str) -> Any:
    if isinstance(node, list):
        return node[int(part)] if part.isdecimal() and int(part) < len(node) else None
    return node.get(part) if isinstance(node, dict) else None


def _validate(data: dict[str, Any]) -> tuple[Recipe | None, list[str], bool]:
    """The recipe, the problems of its single values, and whether its ``model`` can be relied on.

    What is wrong is taken out and the rest tried again, so that the checks of whole sections, and those against the
    model, can be reported together with wrong keys and values.
    """
    data = copy.deepcopy(data)
    problems: list[str] = []
    removed: list[Place] = []
    for _ in range(8):
        try:
            recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
            return recipe, problems, ("model",) not in removed
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                place: Place = detail["loc"]
                if not any(place[: len(gone)] == gone or gone[: len(place)] == place for gone in removed):
                    problems.append(_describe(place, detail["type"], detail["input"], detail["msg"]))
                removed.append(_take_out(data, place))
    return None, problems, False


def _take_out(data: dict[str, Any], place: Place) -> Place:
    """Removes what an error points at, or the nearest thing around it that can be left out; returns its path."""
    node: Any = data
    path: list[str | int] = []
    for part in place:
        if not isinstance(node, dict) or part not in node:
            break
        path.append(part)
        node = node[part]
    if not path:
        data[str(place[0])] = "unnamed"
        return place[:1]
    holder = data
    for part in path[:-1]:
        holder = holder[str(part)]
    holder.pop(str(path[-1]), None)
    return tuple(path)


def _misfits(recipe: Recipe, config: ConfigSource | None) -> list[str]:
    if config is None or not callable(config):
        return problems_for(recipe, config)
    try:
        return problems_for(recipe, config(recipe))
    except InputError as error:
        return [*problems_for(recipe), f"model: {error}"]


def _describe(place: Place, kind: str, given: object, message: str) -> str:
    """One validation error in the words of this package."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if kind == "extra_forbidden":
        return f"{path}: {_unknown(place, 'key')}"
    setting = find(place)
    if setting is None:
        return f"{path}: {message}"
    if kind == "missing":
        return f"{path}: missing, needed: {setting.allowed} ({setting.info.description})"
    text = f"{path}: given {_shown(given)}, allowed: {setting.allowed}"
    if kind == "value_error":
        return f"{path}: {message.removeprefix('Value error, ')}"
    if kind == "literal_error":
        close = difflib.get_close_matches(str(given), _options(setting.info.annotation), 1)
        return text + (f"; did you mean {close[0]}?" if close else "")
    return f"{text} ({setting.info.description})"


def _options(annotation: Any) -> list[str]:
    """All words that an annotation accepts."""
    inner = get_args(annotation)
    if getattr(annotation, "__origin__", None) is Literal:
        return [str(option) for option in inner]
    return [word for part in inner if part is not Ellipsis for word in _options(part)]


def _unknown(path: Sequence[str | int], what: str) -> str:
    """Why there is no setting at a path: it was removed, or never was."""
    replaced = replacement(path)
    return f"unknown {what}{_meant(path)}" if replaced is None else f"removed; {replaced}"


def _meant(path: Sequence[str | int]) -> str:
    close = nearest(path)
    if close is not None:
        return f"; did you mean {close}?"
    parent = find(path[:-1]) if len(path) > 1 else None
    known = parent.section if parent and parent.section else Recipe
    return f"; known here: {', '.join(known.model_fields)}"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
