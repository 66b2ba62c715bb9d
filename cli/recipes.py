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
from actvar_convert.system.paths import path_of

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
        Path | None,
        typer.Argument(parser=path_of, metavar="FILE", help="The copy. Default: NAME.yaml in this folder."),
    ] = None,
    verbose: opt.Verbose = False,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    typer.echo(copy_recipe(name, target))


@app.command("validate", epilog=closing("actvar recipes validate mine.yaml", "actvar run mine.yaml"))
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Names of shipped recipes, or YAML files.")],
    override: opt.Overrides = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Estimate the memory of each of N GPUs that share a distillation.")
    ] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="With --processes: the model in training is split over them.")
    ] = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check recipes, each against the model it names, without running them; all problems of all of them at once.

    Weights are not read: an official name needs no file and no network, of a file only names and shapes are looked at.
    Beside the estimated memory stands what is free on this machine now.
    """
    if shard and processes == 1:
        raise typer.BadParameter("it splits a model over several processes; give --processes too", param_hint="--shard")
    problems = []
    for recipe in recipes:
        try:
            found = av.validate_recipe(recipe, override or (), processes=processes, sharded=shard)
        except RecipeError as error:
            problems.append(str(error))
        else:
            typer.echo(f"{recipe}: ok")
            for line in validation_lines(found):
                typer.echo(f"  {line}")
    if problems:
        raise RecipeError("\n".join(problems))


def validation_lines(found: av.ValidationResult) -> list[str]:
    """What a valid recipe amounts to: its model, its plans, the memory that it will need and that is free here."""
    from actvar_convert.system.device import memory_text

    plans = [
        f"plan {name}: {plan.flops / 1e9:,.1f} of {found.dense_flops / 1e9:,.1f} GFLOPs per image, "
        f"{100 * plan.reduction:.1f} % saved"
        for name, plan in found.plans.items()
    ]
    where = "on one device" if found.processes == 1 else f"on each of {found.processes} devices"
    memory = (
        f"estimated memory: convert {memory_text(found.convert_bytes)}, distill {memory_text(found.distill_bytes)} "
        f"{where}{', sharded' if found.sharded else ''}"
    )
    shared = found.distill_here_bytes > found.distill_bytes
    each = f" ({found.processes} of {memory_text(found.distill_bytes)})" if shared else ""
    here = [
        f"convert needs {memory_text(found.convert_bytes)}, {memory_text(found.machine_free_bytes)} are free here: "
        f"{'fits' if found.convert_fits else 'does not fit'}",
        f"distill on {found.device} needs {memory_text(found.distill_here_bytes)}{each}, "
        f"{memory_text(found.device_free_bytes)} are free here: {'fits' if found.distill_fits else 'does not fit'}",
    ]
    if not found.distill_fits and found.processes == 1:
        here.append("--processes N [--shard] estimates the memory of each of N GPUs instead")
    return [found.model, *plans, memory, *here]
