"""The commands around shipped recipes: list, show, copy, validate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from actvar_convert.errors import RecipeError
from actvar_convert.recipe import copy_recipe, dump_recipe, load_recipe, shipped_recipes

from . import options as opt
from .console import closing, show, show_text

app = typer.Typer(help="The shipped recipes: what there is, what one says, a copy to edit, a check of your own.")

Source = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")]


@app.command("list", epilog=closing("actvar recipes list", "actvar recipes show fashion"))
def list_recipes(form: opt.OutputFormat = opt.Format.table, verbose: opt.Verbose = False) -> None:
    """List the shipped recipes."""
    recipes = [load_recipe(name) for name in shipped_recipes()]
    if form is opt.Format.json:
        rows = [{"name": each.name, "model": each.model, "description": each.description} for each in recipes]
        show_text(json.dumps(rows, indent=2))
        return
    table = Table("recipe", "model", "what it is for", box=SIMPLE_HEAD, pad_edge=False)
    for each in recipes:
        table.add_row(each.name, each.model, each.description)
    show(table)


@app.command("show", epilog=closing("actvar recipes show fashion --explain", "actvar recipes copy fashion mine.yaml"))
def show_recipe(
    recipe: Source,
    override: opt.Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Put meaning and range above every setting.")] = False,
    verbose: opt.Verbose = False,
) -> None:
    """Print a recipe with all defaults written out."""
    show_text(dump_recipe(load_recipe(recipe, override or ()), explain=explain))


@app.command("copy", epilog=closing("actvar recipes copy ci mine.yaml", "actvar recipes validate mine.yaml"))
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The copy. Default: NAME.yaml in this folder.")
    ] = None,
    verbose: opt.Verbose = False,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    typer.echo(copy_recipe(name, target))


@app.command("validate", epilog=closing("actvar recipes validate mine.yaml", "actvar run mine.yaml"))
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names of shipped recipes, or YAML files.")],
    override: opt.Overrides = None,
    verbose: opt.Verbose = False,
) -> None:
    """Check recipes without running them; all problems of all of them at once."""
    problems = []
    for recipe in recipes:
        try:
            load_recipe(recipe, override or ())
            typer.echo(f"{recipe}: ok")
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
