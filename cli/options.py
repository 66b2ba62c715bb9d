"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypedDict, TypeVar

import typer

from actvar_convert.errors import InputError
from actvar_convert.recipe.shape import Shape, parse_shape, with_weights
from actvar_convert.system.paths import path_of

from .console import be_quiet, be_verbose, overrule

T = TypeVar("T")


class Format(StrEnum):
    """How a result is printed."""

    table = "table"
    json = "json"


class FlopsFormat(StrEnum):
    """How a FLOPs report is printed."""

    table = "table"
    json = "json"
    csv = "csv"
    html = "html"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A bundled name (fashion), an official name (var-d16), a model file, or a model folder."
    ),
]
Vae = Annotated[
    Path | None,
    typer.Option("--vae", parser=path_of, metavar="FILE", help="Tokenizer file, if the model does not bring its own."),
]
ShapeText = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="NAME=VALUE,...",
        help="What a dense file does not tell: heads=16,sides=1-2-3-4,residual_ratio=0.5, or some of these.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME",
        help="Which of several weights in a dense file: ema, or all their names begin with.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", parser=path_of, metavar="DIR", help="Output folder. Default: runs/NAME.")
]
RecipeSource = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME|FILE", help="Name of a shipped recipe, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a setting of the recipe; may be given several times."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps. Default: the GPU if there is one.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="fp32, bf16 or fp16; of a recipe fp32 or bf16.")]
DecoderDtype = Annotated[
    str | None,
    typer.Option("--decoder-dtype", metavar="NAME", help="Dtype of the tokenizer's decoder. Default: fp32."),
]
RecipeSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed; the recipe's own by default.")]
Plan = Annotated[str | None, typer.Option("--plan", metavar="NAME", help="Which plan of a sparse model is used.")]
Teacher = Annotated[
    str | None,
    typer.Option("--teacher", metavar="MODEL", help="The dense model. Default: the source that the folder records."),
]
Shard = Annotated[
    bool, typer.Option("--shard", help="Under torchrun: split the model in training over the GPUs, for the largest.")
]
Work = Annotated[
    Path | None,
    typer.Option(
        "--work", parser=path_of, metavar="DIR", help="Folder of unfinished work, empty or new. Default: OUT.work."
    ),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        "--rows",
        parser=path_of,
        metavar="FILE",
        help="Text rows of prompts (safetensors: values, lengths), for a model that makes images of text.",
    ),
]
TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over", callback=overrule, help="Go on with work of another host, whose process is known to be dead."
    ),
]
OutputFormat = Annotated[Format, typer.Option("--format", help="How the result is printed.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=be_quiet, help="No progress and no peak memory on stderr.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", callback=be_verbose, help="Tracebacks of errors, and the log, on stderr.")
]


class DenseFlags(TypedDict):
    """What the flags say of dense files: arguments of ``load``, ``inspect`` and ``report_flops``."""

    vae: Path | None
    shape: Shape | None


def dense_flags(vae: Path | None, shape: str | None, weights: str | None = None) -> DenseFlags:
    """The flags ``--vae``, ``--shape`` and ``--weights``, which becomes a part of the shape."""
    if shape is not None and not shape.strip():
        raise typer.BadParameter("nothing given; leave it out, or give name=value,...", param_hint="--shape")
    try:
        known = None if shape is None else parse_shape(shape)
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from None
    try:
        return DenseFlags(vae=vae, shape=known if weights is None else with_weights(known, weights))
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--weights") from None


def several(text: str, option: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """The values of an option that takes a comma-separated list."""
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        example = "0.1,0.2" if kind is float else "0,1,2"
        raise typer.BadParameter(f"{text!r} is not a list such as {example}", param_hint=option) from None
