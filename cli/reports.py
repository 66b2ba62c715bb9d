"""The commands that measure or describe a model: report-flops, evaluate, benchmark, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import actvar_convert as av
from actvar_convert.errors import InputError
from actvar_convert.system.paths import path_of

from . import options as opt
from .console import closing, reporter, show, show_html, show_json, show_text

app = typer.Typer()


def own_flags(model: str, dense: opt.DenseFlags, other: str | None) -> opt.DenseFlags:
    """The flags of dense files for a model beside another: a sparse folder needs none, and they are the other's."""
    given = any(value is not None for value in dense.values())
    if not given or other is None or not Path(model).is_dir() or av.inspect(model).kind != "sparse":
        return dense
    return opt.dense_flags(None, None)


@app.command(
    "report-flops", epilog=closing("actvar report-flops var-d16 --format json", "actvar convert MODEL --out DIR")
)
def report_flops(
    model: opt.Model,
    guidance: Annotated[
        bool, typer.Option("--guidance/--no-guidance", help="With both rows of classifier-free guidance, or one.")
    ] = True,
    form: Annotated[opt.FlopsFormat, typer.Option("--format", help="How the report is printed.")] = (
        opt.FlopsFormat.table
    ),
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """FLOPs and MACs per image, dense against sparse, per component, block and scale.

    No weights are read; an official name such as var-d16 needs no file and no network.
    """
    from actvar_convert.show.html import flops_html
    from actvar_convert.show.tables import flops_figures, flops_tables
    from actvar_convert.show.terminal import render

    report = av.report_flops(model, guidance=guidance, **opt.dense_flags(vae, shape, weights))
    if form is opt.FlopsFormat.table:
        show(render(*flops_tables(report)))
    elif form is opt.FlopsFormat.json:
        show_json(report.to_json())
    elif form is opt.FlopsFormat.csv:
        show_text(flops_figures(report).to_csv())
    else:
        show_html(flops_html(report))


@app.command(
    epilog=closing("actvar evaluate runs/fashion --images 10000 --seeds 0,1,2", "actvar benchmark runs/fashion")
)
def evaluate(
    model: opt.Model,
    teacher: opt.Teacher = None,
    images: Annotated[
        int, typer.Option("--images", min=0, help="Images per seed, 20 or more; 0: KL and agreement.")
    ] = 5000,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,N,...", help="Seed of every set of images.")] = "0",
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            parser=path_of,
            metavar="PATH",
            help="Real images (folder, or .npz with mu and sigma) for Inception features. Default: bundled classifier.",
        ),
    ] = None,
    rows: opt.Rows = None,
    held_out: Annotated[
        int, typer.Option("--held-out", min=2, help="Pyramids of the teacher that KL and agreement are measured on.")
    ] = 512,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images at once; another number gives other images.")
    ] = 64,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            parser=path_of,
            metavar="DIR",
            help="Keep features here as they are made: the same line goes on, others reuse those of the teacher.",
        ),
    ] = None,
    take_over: opt.TakeOver = False,
    plan: opt.Plan = None,
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    form: opt.OutputFormat = opt.Format.table,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure quality against the dense teacher: FID and companions, distance of pictures, KL and agreement."""
    from actvar_convert.show.tables import quality_tables
    from actvar_convert.show.terminal import render

    chosen = opt.several(seeds, "--seeds", int)
    flags = opt.dense_flags(vae, shape, weights)
    sparse = av.load(model, device=device, dtype=dtype, plan=plan, **own_flags(model, flags, teacher))
    dense = av.load(teacher, device=device, dtype=dtype, **flags) if teacher is not None else None
    report = av.evaluate(
        sparse,
        teacher=dense,
        settings=av.Evaluation(images=images, seeds=chosen, batch=batch, held_out=held_out),
        reference=reference,
        rows=rows,
        cache=cache,
        progress=reporter(quiet),
    )
    if form is opt.Format.json:
        show_json(report.to_json())
    else:
        show(render(*quality_tables(report)))


@app.command(epilog=closing("actvar benchmark runs/fashion --batches 1,16", "actvar sample runs/fashion"))
def benchmark(
    model: opt.Model,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="The model to compare with. Default: the recorded source."),
    ] = None,
    batches: Annotated[str, typer.Option("--batches", metavar="N,N,...", help="Images at once.")] = "1,4,16",
    dtypes: Annotated[
        str, typer.Option("--dtype", metavar="NAME,...", help="fp32, bf16 or fp16, of the transformer.")
    ] = "fp32",
    decoder_dtype: opt.DecoderDtype = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, help="Timed runs per side, after one to warm up. Default: 5.")
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Also the time by component: attention, FFN, router, decoder and others.")
    ] = False,
    plan: opt.Plan = None,
    vae: opt.Vae = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    device: opt.Device = None,
    form: opt.OutputFormat = opt.Format.table,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Time generation, dense against sparse, beside the speed-up that the FLOPs promise."""
    from actvar_convert.show.tables import benchmark_tables
    from actvar_convert.show.terminal import render

    sizes, formats = opt.several(batches, "--batches", int), opt.several(dtypes, "--dtype", str)
    flags = opt.dense_flags(vae, shape, weights)
    sparse = av.load(model, device=device, plan=plan, **own_flags(model, flags, against))
    other = av.load(against, device=device, **flags) if against is not None else None
    report = av.benchmark(
        sparse,
        against=other,
        timing=av.Timing(sizes, formats, decoder_dtype, repeats=5 if repeats is None else repeats, split=split),
        progress=reporter(quiet),
    )
    if form is opt.Format.json:
        show_json(report.to_json())
    else:
        show(render(*benchmark_tables(report)))


@app.command(epilog=closing("actvar inspect var_d16.pth", "actvar report-flops var_d16.pth"))
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A model file or folder, or the name of a model.")],
    vae: Annotated[
        Path | None, typer.Option("--vae", parser=path_of, metavar="FILE", help="Tokenizer file: does it fit?")
    ] = None,
    shape: opt.ShapeText = None,
    weights: opt.Weights = None,
    values: Annotated[bool, typer.Option("--values", help="Read all values too, and count NaN and infinite ones.")] = (
        False
    ),
    form: opt.OutputFormat = opt.Format.table,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say what is in a file: kind of model, shape, tensors that are missing, unexpected or mis-shaped.

    Ends with exit code 2 if that is neither a VAR nor its tokenizer; problems of those are listed and change no exit
    code.
    """
    from actvar_convert.show.tables import inspection_table
    from actvar_convert.show.terminal import render

    inspection = av.inspect(path, values=values, **opt.dense_flags(vae, shape, weights))
    if form is opt.Format.json:
        show_json(inspection.to_json())
    else:
        show(render(inspection_table(inspection)))
    if inspection.kind == "other":
        raise typer.Exit(InputError.exit_code)
