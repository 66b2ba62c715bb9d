"""The command that makes pictures: sample."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import actvar_convert as av
from actvar_convert.system.paths import path_of

from . import options as opt
from .console import closing, reporter

app = typer.Typer()


class Noise(StrEnum):
    """Which generator samples."""

    device = "device"
    cpu = "cpu"


@app.command(
    epilog=closing("actvar sample runs/fashion --per-class 4 --out samples.png", "actvar evaluate runs/fashion")
)
def sample(
    model: opt.Model,
    out: Annotated[Path, typer.Option("--out", parser=path_of, metavar="FILE", help="The picture, a PNG file.")] = Path(
        "samples.png"
    ),
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="N,N,...", help="Classes, a column each; -1: no class. Default: the first ten."
        ),
    ] = None,
    rows: opt.Rows = None,
    per_class: Annotated[int, typer.Option("--per-class", min=1, help="Images of every class or prompt.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Equal seeds give equal images.")] = 0,
    cfg: Annotated[
        float | None, typer.Option("--cfg", min=0, help="Strength of guidance. Default: the model's.")
    ] = None,
    tau: Annotated[float | None, typer.Option("--tau", help="Temperature, above 0. Default: the model's.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Only the k likeliest tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0, max=1, help="Only the likeliest tokens up to this share; 0: all.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="On a GPU: record CUDA graphs first (seconds), then replay them.")
    ] = False,
    noise: Annotated[
        Noise,
        typer.Option("--noise", help="Sample on the model's device, or as a CPU does: equal images on every machine."),
    ] = Noise.device,
    plan: opt.Plan = None,
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    decoder_dtype: opt.DecoderDtype = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Generate images and write them as one picture, a column per class or prompt."""
    classes = opt.several(labels, "--labels", int) if labels is not None else None
    dense = opt.dense_flags(vae, shape, weights)
    av.sample(
        av.load(model, device=device, dtype=dtype, decoder_dtype=decoder_dtype, plan=plan, **dense),
        out=out,
        labels=classes,
        rows=rows,
        per_class=per_class,
        seed=seed,
        cfg=cfg,
        tau=tau,
        top_k=top_k,
        top_p=top_p,
        compile=compile,
        noise=noise.value,
        progress=reporter(quiet),
    )
    typer.echo(out)
