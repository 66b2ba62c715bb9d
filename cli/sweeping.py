"""The command that asks what a cut would cost before anything is trained: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import actvar_convert as av
from actvar_convert.recipe import Recipe, load_recipe, shipped_recipes
from actvar_convert.system.paths import path_of

from . import options as opt
from .console import closing, reporter, show, show_json
from .making import asked_by, flag_settings, model_setting, overrides, recipe_for

app = typer.Typer()


def names_recipe(source: str) -> bool:
    """Whether an argument means a recipe, and with it the model that the recipe names."""
    return source in shipped_recipes() or Path(source).suffix in (".yaml", ".yml")


@app.command(
    epilog=closing(
        "actvar sweep fashion --reductions 0.1,0.2,0.3 --max-kl 0.1",
        "actvar convert fashion --set budget.reduction=0.2 --out DIR",
    )
)
def sweep(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="The dense model: a bundled name, an official name, a file or folder; or a recipe that names it.",
        ),
    ],
    recipe: opt.RecipeSource = None,
    reductions: Annotated[
        str, typer.Option("--reductions", metavar="N,N,...", help="Shares of the transformer's FLOPs to save.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6",
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", metavar="NATS", help="Mark the largest cut whose KL per token is at most this."),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=0, help="Images per model for FID; 0: no FID.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=path_of, metavar="DIR", help="Output folder. Default: runs/NAME-sweep."),
    ] = None,
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    override: opt.Overrides = None,
    device: opt.Device = None,
    seed: opt.RecipeSeed = None,
    work: opt.Work = None,
    take_over: opt.TakeOver = False,
    form: opt.OutputFormat = opt.Format.table,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Chart quality against cost: convert at a series of cuts, train nothing, measure each against the dense model.

    All cuts share their calibration and held-out pyramids. The same line again resumes, and other --reductions add to
    the curve. The folder gets sweep.json, sweep.csv and sweep.png.
    """
    from actvar_convert.show.tables import sweep_table
    from actvar_convert.show.terminal import render

    flags = opt.dense_flags(vae, shape, weights)
    settings = [*overrides(override, seed=seed, device=device), *flag_settings(flags)]
    method: str | Recipe
    if recipe is None and names_recipe(source):
        chosen = load_recipe(source, settings)
        model, method = chosen.model, chosen
    else:
        model, method = source, recipe or recipe_for(source)
        settings.append(model_setting(source, override))
    asked = asked_by(method, settings, flags)
    dense = av.load(model, device=device or asked.device, **asked.dense)
    resolved = load_recipe(method, settings, config=dense.transformer.config)
    folder = out or Path("runs") / f"{resolved.name}-sweep"
    report = av.sweep(
        dense,
        recipe=resolved,
        reductions=opt.several(reductions, "--reductions", float),
        images=images,
        max_kl=max_kl,
        out=folder,
        work=work,
        progress=reporter(quiet),
    )
    if form is opt.Format.json:
        show_json(report.to_json())
    else:
        show(render(sweep_table(report)))
        typer.echo(folder)
