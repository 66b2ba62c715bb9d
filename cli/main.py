"""The ``actvar`` command: all sub-commands in the usual order."""

from __future__ import annotations

import os

# Before torch is imported: OpenMP reads it once. Threads that wait for work would spin, and two of them slow each other
# down wherever another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Annotated

import typer

from actvar_convert._version import __version__
from actvar_convert.errors import InputError
from actvar_convert.system.launch import launched

from . import exporting, making, pictures, recipes, reports, sweeping
from .console import ActvarGroup
from .streams import prepare_streams

ORDER = """The usual order:

1. actvar recipes list - what is there to start from

2. actvar report-flops MODEL - what the dense model costs; actvar sweep MODEL - what cuts of it would do

3. actvar convert MODEL --out DIR, then actvar distill DIR - or both and all reports at once: actvar run RECIPE

4. actvar evaluate DIR, actvar benchmark DIR - what it lost, what it gained

5. actvar sample DIR - pictures

Example: actvar run fashion

Then: actvar sample runs/fashion"""

app = typer.Typer(cls=ActvarGroup, add_completion=False, pretty_exceptions_show_locals=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=ORDER)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Turn a trained dense VAR image generator into one that does less work per image."""
    if ctx.invoked_subcommand is None:
        text = ctx.get_help()
        if text:
            typer.echo(text)


for _group in (making.app, sweeping.app, reports.app, pictures.app, exporting.app):
    app.registered_commands += _group.registered_commands
app.add_typer(recipes.app, name="recipes")


def _one_of_several() -> bool:
    try:
        return launched().count > 1
    except InputError:
        return False


def main() -> None:
    """Entry point of the console script."""
    prepare_streams()
    try:
        app(prog_name="actvar")
    except SystemExit as end:
        if _one_of_several():
            from actvar_convert.system.device import end_process

            end_process(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
