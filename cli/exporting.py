"""The command that leads back to other programs: export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import actvar_convert as av
from actvar_convert.system.paths import path_of

from . import options as opt
from .console import closing

app = typer.Typer()


class Layout(StrEnum):
    """How the tensors are named and stored."""

    reference = "reference"


@app.command(
    epilog=closing(
        "actvar export runs/d16 --format reference --out var_d16.pth --vae-out vae.pth", "actvar inspect var_d16.pth"
    )
)
def export(
    model: opt.Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out", parser=path_of, metavar="FILE", help="The transformer's file, ending in .safetensors or .pth."
        ),
    ],
    vae_out: Annotated[
        Path | None,
        typer.Option("--vae-out", parser=path_of, metavar="FILE", help="Write the tokenizer too, to this file."),
    ] = None,
    form: Annotated[Layout, typer.Option("--format", help="The official layout of VAR files.")] = Layout.reference,
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    dtype: opt.Dtype = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write a model's dense weights under the official names, for programs that know VAR and nothing else.

    Of a sparse model that is its dense skeleton, neurons back in their order; what makes it sparse is left out.
    """
    dense = opt.dense_flags(vae, shape, weights)
    loaded = av.load(model, device="cpu", dtype=dtype, **dense)
    written = av.export(loaded, out=out, vae_out=vae_out, format=form.value)
    if written.left_out:
        typer.echo(f"left out, since a dense VAR has no place for it: {', '.join(written.left_out)}", err=True)
    for file in written.files:
        typer.echo(file)
