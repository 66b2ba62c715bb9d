"""Tables for a terminal, by rich. Functions return; they do not print."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from actvar_convert.show.figures import Table


def render(*tables: Table) -> RenderableType:
    """Tables under each other, each with its notes below it."""
    parts: list[RenderableType] = []
    for table in tables:
        parts += [_table(table), *(Text(note, style="dim") for note in table.notes)]
    return Group(*parts)


def _table(table: Table) -> RichTable:
    named = any(column.name for column in table.columns)
    drawn = RichTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=named,
    )
    for column in table.columns:
        words = column.words
        drawn.add_column(Text(column.name), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in table.rows:
        if row.total:
            drawn.add_section()
        drawn.add_row(*(Text(cell.text) for cell in row.cells), style="bold" if row.total else None)
    return drawn
