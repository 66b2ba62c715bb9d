"""The commands that make a sparse model: convert, distill, run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

import actvar_convert as av
from actvar_convert.errors import ActvarError, InputError, RecipeError
from actvar_convert.recipe import Recipe, load_recipe, settled, shipped_recipes
from actvar_convert.system.paths import path_of

from . import options as opt
from .console import closing, reporter, show

app = typer.Typer()


def overrides(
    given: list[str] | None, *, seed: int | None = None, device: str | None = None, dtype: str | None = None
) -> list[str]:
    """Overrides of a recipe: those of ``--set``, then those that have flags of their own."""
    flags = {"seed": seed, "device": device, "dtype": dtype}
    return [*(given or []), *(f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None)]


def override_paths(given: list[str] | None) -> list[str]:
    """The settings that ``--set`` names."""
    return [text.partition("=")[0].strip() for text in given or []]


def recipe_for(model: str) -> str | Recipe:
    """The recipe of a model for which none is named: the shipped one of that name or file name, else all defaults."""
    shipped = shipped_recipes()
    for name in (model, Path(model).stem.replace("-", "_")):
        if name in shipped:
            return name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).stem).strip("-._")
    return Recipe(name=name or "model", model=model)


def flag_settings(flags: opt.DenseFlags) -> list[str]:
    """What flags say of the dense model, as overrides: they overrule a recipe, and the written one says so."""
    vae = [] if flags["vae"] is None else [f"vae={json.dumps(str(flags['vae']))}"]
    shape = {} if flags["shape"] is None else flags["shape"].model_dump(mode="json", exclude_none=True)
    return [*vae, *(f"shape.{name}={json.dumps(value)}" for name, value in shape.items())]


def model_setting(model: str, given: list[str] | None) -> str:
    """The override that makes a recipe name the model that is the command's argument.

    Raises:
        InputError: ``--set`` names a model too.
    """
    if "model" in override_paths(given):
        raise InputError(f"--set model: the model is {model}, the command's argument. Name the other one there.")
    return f"model={json.dumps(model)}"


class Asked(NamedTuple):
    """What a recipe asks for before its model is loaded: what its files do not tell, device, memory by the recipe."""

    dense: opt.DenseFlags
    device: str | None
    recipe: Recipe | None


def asked_by(source: str | Path | Recipe, settings: list[str], flags: opt.DenseFlags) -> Asked:
    """What a recipe asks for; if it is wrong the flags alone, and that it is wrong is said with all else later.

    Args:
        source, settings: see ``load_recipe``; the flags are among the settings.
        flags: what the command line says of the dense model.
    """
    try:
        chosen = load_recipe(source, settings)
    except RecipeError:
        return Asked(flags, None, None)
    dense = opt.DenseFlags(vae=None if chosen.vae is None else Path(chosen.vae), shape=chosen.shape)
    return Asked(dense, chosen.device, chosen)


def refuse_settled(given: list[str] | None) -> None:
    """Raises InputError for overrides of a distillation that only a conversion could follow."""
    late = [path for path in override_paths(given) if path.partition(".")[0] in settled()]
    if late:
        raise InputError(
            f"--set {', '.join(late)}: this is settled when a model is converted, and training cannot change it. "
            "Set it for actvar convert, or for actvar run."
        )


def require_converted(folder: Path) -> None:
    """Raises InputError for a model, named or on disk, that is no sparse folder."""
    try:
        kind = av.inspect(str(folder)).kind
    except ActvarError:
        return  # what is wrong with it is said when it is loaded
    if kind != "sparse":
        raise InputError(
            f"{folder} is not the folder of a sparse model; a dense model is to be converted first: "
            f"actvar convert {folder} --out DIR"
        )


@app.command(
    epilog=closing("actvar convert fashion --recipe fashion --out runs/fashion", "actvar distill runs/fashion")
)
def convert(
    model: opt.Model,
    out: opt.Out = None,
    recipe: opt.RecipeSource = None,
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    override: opt.Overrides = None,
    device: opt.Device = None,
    seed: opt.RecipeSeed = None,
    work: opt.Work = None,
    take_over: opt.TakeOver = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Calibrate, cluster, attach routers and gates to a dense model; the result generates at once.

    Without --recipe it is the shipped one with the model's name, or the defaults. A distilled model is replaced only
    if --out names its folder.
    """
    flags = opt.dense_flags(vae, shape, weights)
    settings = [*overrides(override, seed=seed, device=device), *flag_settings(flags), model_setting(model, override)]
    source = recipe or recipe_for(model)
    asked = asked_by(source, settings, flags)
    dense = av.load(model, device=device or asked.device, recipe=asked.recipe, **asked.dense)
    resolved = load_recipe(source, settings, config=dense.transformer.config)
    folder = out or Path("runs") / resolved.name
    sparse = av.convert(
        dense, recipe=resolved, out=folder, work=work, progress=reporter(quiet), replace=out is not None, keep=False
    )
    typer.echo(folder)
    if sparse.plan.guidance == "folded":
        typer.echo("guidance is folded in, and only distillation teaches it: until then images are unguided", err=True)


@app.command(epilog=closing("actvar distill runs/fashion", "actvar evaluate runs/fashion"))
def distill(
    folder: Annotated[
        Path, typer.Argument(parser=path_of, metavar="DIR", help="Sparse model folder, as written by convert.")
    ],
    teacher: opt.Teacher = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=path_of, metavar="DIR", help="Output folder. Default: the model's own folder."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="NAME|FILE", help="Default: the recipe in the model's folder.")
    ] = None,
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    override: opt.Overrides = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    seed: opt.RecipeSeed = None,
    shard: opt.Shard = False,
    work: opt.Work = None,
    take_over: opt.TakeOver = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Train a sparse model in two stages to follow its dense teacher; the same line again resumes.

    The teacher is the source that the folder records, or --teacher. A model that is distilled already is trained on and
    replaced only if --out names its folder. Of --recipe is used what a training can follow: what the conversion has
    settled (experts, gate, plans, ...) stays as the folder's own recipe says.
    """
    flags = opt.dense_flags(vae, shape, weights)
    if teacher is None and any(value is not None for value in flags.values()):
        given = {"--vae": vae, "--shape": shape, "--weights": weights}
        alone = ", ".join(name for name, value in given.items() if value is not None)
        raise typer.BadParameter("it says something of --teacher; give that too", param_hint=alone)
    refuse_settled(override)
    require_converted(folder)
    settings = overrides(override, seed=seed, device=device, dtype=dtype)
    source: str | Path | Recipe = recipe or folder / "recipe.yaml"
    place = asked_by(source, settings, flags).device
    sparse = av.load(folder, device=device or place)
    if recipe is not None:
        own = load_recipe(folder)
        source = load_recipe(recipe, settings).model_copy(update={name: getattr(own, name) for name in settled()})
    resolved = load_recipe(source, settings, config=sparse.transformer.config)
    dense = av.load(teacher, device=device or place, **flags) if teacher is not None else None
    av.distill(
        sparse,
        teacher=dense,
        recipe=resolved,
        out=out or folder,
        work=work,
        progress=reporter(quiet),
        shard=shard,
        replace=out is not None,
    )
    typer.echo(out or folder)


@app.command(epilog=closing("actvar run fashion", "actvar sample runs/fashion --out samples.png"))
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")],
    out: opt.Out = None,
    override: opt.Overrides = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    seed: opt.RecipeSeed = None,
    shard: opt.Shard = False,
    work: opt.Work = None,
    take_over: opt.TakeOver = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Do all that a recipe says: convert, distill, report, sample, check. The same line again resumes.

    A distilled model of another run is replaced only if --out names its folder.

    Ends with exit code 3 when one of the recipe's checks does not hold.
    """
    from actvar_convert.show.tables import Reports, summary_table
    from actvar_convert.show.terminal import render

    settings = overrides(override, seed=seed, device=device, dtype=dtype)
    result = av.run(recipe, out=out, work=work, overrides=settings, progress=reporter(quiet), shard=shard)
    show(render(summary_table(Reports(result.flops, result.quality, result.benchmark))))
    typer.echo(result.folder)
    if result.checks is not None:
        result.checks.raise_if_failed()
