"""The house in figures: ``python tools/house.py [ROOT] [--list]``, to set two states of the project side by side.

Lines, files and classes of the library and the command, recipe settings, functions with eight or more arguments, and
file names that occur twice; with ``--list`` also which functions have so many arguments. Reads the sources as
text and imports nothing of them.
"""

from __future__ import annotations

import argparse
import ast
import collections
from collections.abc import Iterator
from pathlib import Path

WIDE = 8


def sources(root: Path) -> Iterator[Path]:
    """The Python files of the library and the command."""
    for folder in ("actvar_convert", "cli"):
        yield from sorted((root / folder).rglob("*.py"))


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Arguments of a function, without self."""
    own = node.args
    return sum(each.arg not in ("self", "cls") for each in (*own.posonlyargs, *own.args, *own.kwonlyargs))


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is compiled for a GPU, where arguments cannot be grouped."""
    return any("jit" in ast.unparse(each) for each in node.decorator_list)


def figures(root: Path) -> dict[str, int | str]:
    """The figures of one state, by name."""
    found: collections.Counter[str] = collections.Counter()
    names: collections.Counter[str] = collections.Counter()
    for path in sources(root):
        text = path.read_text(encoding="utf-8")
        found["lines"] += text.count("\n")
        found["files"] += 1
        names[path.name] += path.name != "__init__.py"
        for node in ast.walk(ast.parse(text)):
            found["classes"] += isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and arguments(node) >= WIDE:
                found["commands with 8 or more arguments"] += path.is_relative_to(root / "cli")
                found["functions with 8 or more arguments"] += not is_kernel(node) and not path.is_relative_to(
                    root / "cli"
                )
    schema = ast.parse((root / "actvar_convert" / "recipe" / "schema.py").read_text(encoding="utf-8"))
    twice = sorted(name for name, count in names.items() if count > 1)
    return {**found, "settings": settings(schema), "file names used twice": ", ".join(twice) or "none"}


def settings(schema: ast.Module) -> int:
    """Settings of a recipe: fields of its sections that are no section, each section as often as it is used."""
    sections = {node.name: node for node in schema.body if isinstance(node, ast.ClassDef)}

    def fields(name: str) -> dict[str, str]:
        own = sections[name]
        found: dict[str, str] = {}
        for base in own.bases:
            if ast.unparse(base) in sections:
                found |= fields(ast.unparse(base))
        for node in own.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and node.target.id != "model_config"
            ):
                found[node.target.id] = ast.unparse(node.annotation)
        return found

    def count(name: str) -> int:
        kinds = [annotation.split(" | ")[0] for annotation in fields(name).values()]
        return sum(count(kind) if kind in sections else 1 for kind in kinds)

    return count("Recipe")


def wide(root: Path) -> Iterator[str]:
    """Place, name and number of arguments of every function with eight or more, compiled ones apart."""
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if arguments(node) >= WIDE and not is_kernel(node):
                yield f"{path.relative_to(root)}:{node.lineno} {node.name} {arguments(node)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="state to look at")
    parser.add_argument("--list", action="store_true", help="name the functions with eight or more arguments")
    given = parser.parse_args()
    for name, value in figures(given.root).items():
        print(f"{name:38} {value}")
    if given.list:
        print(*wide(given.root), sep="\n")


if __name__ == "__main__":
    main()
