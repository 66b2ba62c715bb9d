"""Imports run one way: the base, then the folders in the order of FOLDERS, the verbs, the command."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = ("errors", "_version", "system")
FOLDERS = (
    *("kernels", "plan", "models", "recipe", "files", "cost", "conversion", "distillation", "measure", "show"),
    *("stores", "origins", "preflight", "verbs", "sweeps", "runs"),
)
"""In the order of imports; each may import the base, itself and what stands before it."""
COMMAND_MAY = ("actvar_convert", "_version", "errors", "system", "recipe", "measure", "show")
"""What the command may import: the public verbs, the base, and what reads recipes and shows results."""


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    found = {}
    for path in sorted((ROOT / "actvar_convert").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, module: str | None = None) -> set[str]:
    """Dotted names of everything in this package that a file imports, wherever in the file the import stands."""
    known, names = set(modules()), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or module is None, f"{path}: relative import"
            if node.level == 0 and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= (inner & known) or {node.module}
    return {name for name in names if name.split(".")[0] == "actvar_convert"}


def layer(module: str) -> str:
    """The folder or file below the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


LIBRARY = {name: path for name, path in modules().items() if name != "actvar_convert"}


@pytest.mark.parametrize("module", LIBRARY)
def test_a_module_imports_nothing_below_it(module: str) -> None:
    own = layer(module)
    assert own in (*BASE, *FOLDERS), f"{module} has no place in the order of imports"
    allowed = set(BASE) if own in BASE else {*BASE, *FOLDERS[: FOLDERS.index(own) + 1]}
    wrong = {name for name in imported(LIBRARY[module], module) if layer(name) not in allowed}
    assert not wrong, f"{module} imports {sorted(wrong)}; allowed: {sorted(allowed)}"


def test_no_cycles() -> None:
    graph = {name: imported(path) & set(LIBRARY) - {name} for name, path in LIBRARY.items()}
    for name, targets in graph.items():
        targets.discard(name.rpartition(".")[0])
    while free := [name for name, targets in graph.items() if not targets]:
        for name in free:
            del graph[name]
        for targets in graph.values():
            targets.difference_update(free)
    assert not graph, f"modules in or behind an import cycle: {sorted(graph)}"


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=lambda path: path.name)
def test_the_command_imports_the_public_api_alone(path: Path) -> None:
    names = imported(path)
    wrong = {name for name in names if layer(name) not in COMMAND_MAY}
    assert not wrong, f"{path.name} imports {sorted(wrong)}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tensors = {"torch", "numpy", "safetensors"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not tensors & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            assert node.module.split(".")[0] not in tensors


def test_the_rule_sees_a_wrong_import(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from actvar_convert.cost import flops\n    from actvar_convert import verbs\n")
    assert imported(file) == {"actvar_convert.cost.flops", "actvar_convert.verbs"}
    assert {layer(name) for name in imported(file)} == {"cost", "verbs"}
