"""Cheap checks of what a wheel would hold; CI builds one and runs the command from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest

import actvar_convert
from actvar_convert.recipe import shipped_recipes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"actvar_convert": "actvar_convert", "actvar_convert_cli": "cli", "actvar_convert_recipes": "recipes"}


def test_every_folder_with_code_is_a_listed_package() -> None:
    expected = set()
    for package, folder in FOLDERS.items():
        for path in {file.parent for file in (ROOT / folder).rglob("*.py")}:
            assert (path / "__init__.py").is_file(), f"{path.relative_to(ROOT)} has no __init__.py"
            expected.add(".".join([package, *path.relative_to(ROOT / folder).parts]))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected
    assert PROJECT["tool"]["setuptools"]["package-dir"] == FOLDERS


def test_every_other_file_of_the_packages_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package, folder in FOLDERS.items():
        root = ROOT / folder
        covered = {path for pattern in patterns[package] for path in root.glob(pattern)}
        files = {
            path
            for path in root.rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc") and path.name[0] != "."
        }
        assert {path.name for path in files - covered} <= {"README.md"}


def test_the_version_is_written_once() -> None:
    literal = re.compile(rf"[\"']{re.escape(actvar_convert.__version__)}[\"']")
    places = [
        path.relative_to(ROOT).as_posix()
        for folder in ("actvar_convert", "cli", "recipes", "tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if literal.search(path.read_text(encoding="utf-8"))
    ]
    assert places == ["actvar_convert/_version.py"]
    assert "version" in PROJECT["project"]["dynamic"]


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *extras["test"], *extras["triton"]]:
        name, least = requirement.partition(";")[0].lower().replace("_", "-").split(">=")
        assert name in pins, f"{name} is not pinned"
        assert _numbers(pins[name]) >= _numbers(least), f"{name} {pins[name]} is older than {least}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "oldest.py"], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert {line.partition("==")[0] for line in lines} == {
        requirement.partition(">=")[0] for requirement in PROJECT["project"]["dependencies"]
    }
    assert "numpy==2.0" in lines and "torch==2.13.0" in lines


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt -e . && actvar run fashion" in readme
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in readme
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_readme_of_the_recipes_lists_all_of_them() -> None:
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\S+)` \|", text, re.MULTILINE) == list(shipped_recipes())


@pytest.mark.parametrize("code", ["import actvar_convert", "import actvar_convert_cli.main"])
def test_help_and_recipes_do_without_torch(code: str) -> None:
    heavy = "{'torch', 'scipy', 'sklearn', 'matplotlib'}"
    check = f"{code}; import sys; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_verbs_are_listed_and_can_be_replaced() -> None:
    assert set(actvar_convert.__all__) <= set(dir(actvar_convert))
    for name in actvar_convert.__all__:
        if name != "__version__":
            assert callable(getattr(actvar_convert, name)), f"{name} is {getattr(actvar_convert, name)}"
    before = actvar_convert.load
    with mock.patch("actvar_convert.load", lambda source: source):
        assert actvar_convert.load("x") == "x"
    assert actvar_convert.load is before
