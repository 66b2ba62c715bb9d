"""recipes/README.md says of every setting what chose it, and points to entries of the lab book that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from actvar_convert.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
TABLE = TEXT.split("## What chose the settings")[1].split("\n## ")[0]
MEASURING = ("evaluate", "benchmark", "checks")
"""Sections that say what is measured, and change no model."""
NAMING = ("name", "description", "model", "vae", "shape", "seed", "device")


def leaves(section: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{path}{name}.")
        else:
            yield path + name


def test_every_setting_says_what_chose_it() -> None:
    first = [line.split("|")[1] for line in TABLE.splitlines() if line.startswith("|")]
    named = {name for cell in first for name in re.findall(r"`([\w.]+)", cell)}
    asked = {path for path in leaves(Recipe) if path.split(".")[0] not in (*MEASURING, *NAMING)}
    assert len(asked) > 25 and asked - named == set()
    assert {name for name in named if "." in name} <= asked


def test_what_chose_it_is_in_the_lab_book() -> None:
    book = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", book, re.MULTILINE)
    anchors = {re.sub(r"\s", "-", re.sub(r"[^\w\- ]", "", heading.lower())) for heading in headings}
    rows = [line for line in TABLE.splitlines() if line.startswith("| `")]
    for row in rows:
        links = re.findall(r"\(\.\./docs/experiments\.md#([\w-]+)\)", row)
        assert set(links) <= anchors, row
        assert links or "not measured" in row, row
