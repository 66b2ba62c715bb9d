"""YAML as recipes use it: the value rules of YAML 1.2, so that ``1e-4`` is a number and ``no`` is a word.

PyYAML follows YAML 1.1, which reads ``1e-4`` as text, ``no`` as false and ``1:30`` as 90.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

_NULL = (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_BOOL = (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_INT = (re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_FLOAT = (
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)

MAX_VALUES = 200_000
"""Values of a text with its aliases written out; a plan of VAR-d36 takes about 1,500."""
MAX_LETTERS = 2**19
"""Of a text; PyYAML reads some 100,000 a second."""
MAX_NESTING = 64
"""Sections within sections; recipes have four. PyYAML takes the square of the nesting in time."""


class _Loader(yaml.SafeLoader):
    """Safe loader with the value rules and kinds of YAML 1.2 that also refuses a key given twice, and deep nesting.

    A kind can be written before any text (``!!bool maybe``), so what makes a value checks the text by the same rule.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (the name and the kind are PyYAML's)
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        self._go_deeper()
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        self._go_deeper()
        return bool(super().add_indent(column))

    def _go_deeper(self) -> None:
        if self.flow_level + len(self.indents) >= MAX_NESTING:
            raise yaml.scanner.ScannerError(None, None, f"more than {MAX_NESTING} levels of nesting", self.get_mark())

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """YAML 1.2 has no keys that merge another section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes text which either version of YAML would read as something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _of(pattern: re.Pattern[str], make: Callable[[str], Any]) -> Callable[[_Loader, yaml.Node], Any]:
    def construct(loader: _Loader, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode) or not pattern.match(node.value):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"this is no {kind}", node.start_mark)
        return make(node.value)

    return construct


_MAKE: dict[str, tuple[tuple[re.Pattern[str], list[str]], Callable[[str], Any]]] = {
    "null": (_NULL, lambda text: None),
    "bool": (_BOOL, lambda text: text.lower() == "true"),
    "int": (_INT, int),
    "float": (_FLOAT, lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))),
}

for _tag, ((_pattern, _first), _make) in _MAKE.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _of(_pattern, _make))


def read_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: text that is not YAML, with line and column, or one that is too long, nested too deep, or whose
            aliases (``*name``) grow beyond all use.
    """
    if len(text) > MAX_LETTERS:
        raise ValueError(f"it has {len(text):,} letters; at most {MAX_LETTERS:,} are read")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _values(node: yaml.Node, counted: dict[yaml.Node, int]) -> int:
    """Number of values that a node stands for, its aliases written out: a few lines of them can mean billions.

    Args:
        counted: numbers of the nodes seen so far; 0 while a node's own content is being counted.
    """
    if node in counted:
        if not counted[node]:
            raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
        return counted[node]
    counted[node] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    counted[node] = 1 + sum(_values(part, counted) for part in inner)
    if counted[node] > MAX_VALUES:
        raise yaml.constructor.ConstructorError(
            None, None, f"more than {MAX_VALUES:,} values, aliases written out", node.start_mark
        )
    return counted[node]


def write_yaml(value: Any, *, flow: bool = False) -> str:
    """A value as YAML, keys in their order; ``flow`` puts it on one line."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10**6 if flow else 100,
        default_flow_style=flow,
    )
    return text.removesuffix("\n...\n").rstrip("\n") if flow else text
