"""The commands around shipped recipes: list, show, copy, validate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import actvar_convert as av
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
    """Check recipes, each against the model it names, without running them; all problems of all of them at once.

    Weights are not read: an official name needs no file and no network, of a file only names and shapes are looked at.
    """
    problems = []
    for recipe in recipes:
        try:
            found = av.validate_recipe(recipe, override or ())
        except RecipeError as error:
            problems.append(str(error))
        else:
            typer.echo(f"{recipe}: ok")
            for line in validation_lines(found):
                typer.echo(f"  {line}")
    if problems:
        raise RecipeError("\n".join(problems))


def validation_lines(found: av.ValidationResult) -> list[str]:
    """What a valid recipe amounts to: its model, its plans, the memory it will need."""
    plans = [
        f"plan {name}: {plan.flops / 1e9:,.1f} of {found.dense_flops / 1e9:,.1f} GFLOPs per image, "
        f"{100 * plan.reduction:.1f} % saved"
        for name, plan in found.plans.items()
    ]
    convert, distill = (size / 1e9 for size in (found.convert_bytes, found.distill_bytes))
    return [found.model, *plans, f"estimated memory: convert {convert:.1f} GB, distill {distill:.1f} GB on one device"]
