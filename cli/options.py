"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypedDict, TypeVar

import typer

from .console import be_quiet, be_verbose

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
    Path | None, typer.Option("--vae", metavar="FILE", help="Tokenizer file, where the model does not bring its own.")
]
Heads = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Attention heads of a dense file that does not tell. Default: width / 64."),
]
Sides = Annotated[
    str | None,
    typer.Option(
        "--sides", metavar="N,N,...", help="Side of every scale, coarse to fine, of a dense file that does not tell."
    ),
]
ResidualRatio = Annotated[
    float | None,
    typer.Option(
        "--residual-ratio", min=0, max=1, help="Share of the phi convolutions in a dense model's tokenizer; 0.5."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder. Default: runs/NAME.")]
RecipeSource = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME|FILE", help="Name of a shipped recipe, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a setting of the recipe; may be given several times."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps. Default: the GPU where there is one.")
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Number format: fp32, bf16 or fp16.")]
DecoderDtype = Annotated[
    str | None,
    typer.Option("--decoder-dtype", metavar="NAME", help="Number format of the tokenizer's decoder. Default: fp32."),
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
    heads: int | None
    sides: tuple[int, ...] | None
    residual_ratio: float | None


def dense_flags(vae: Path | None, heads: int | None, sides: str | None, residual_ratio: float | None) -> DenseFlags:
    """The flags ``--vae``, ``--heads``, ``--sides`` and ``--residual-ratio``."""
    listed = None if sides is None else several(sides, "--sides", int)
    return DenseFlags(vae=vae, heads=heads, sides=listed, residual_ratio=residual_ratio)


def several(text: str, option: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    """The values of an option that takes a comma-separated list."""
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list such as 0,1,2", param_hint=option) from None
