"""Speed on the CPU: plain, dense and sparse generation of ``fashion`` and of d16's exact shape.

    python benchmarks/cpu.py --out cpu.json

Two cores take about twenty minutes. Three sides alternate: the straightforward implementation
(``plain.py``), the dense model and a sparse one. ``fashion`` runs the plan of its recipe, or that of the folder given
with --sparse; d16 has random weights and a plan of 40 % fewer transformer FLOPs. The extent ``images`` adds the decoder
to ``tokens``; beside a transformer in bf16 it runs in bf16 too where that is faster (``vqvae.FAST_DECODERS``), that of
the plain path always in fp32.

Rows are printed and written as they are finished. The last column says whether a row reaches what the project asks of
two cores: see ``goals``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from plain import PlainGeneration
from sides import Goal, Results, Row, measure, random_dense, random_sparse, recipe_plan, same_tokens

import actvar_convert as av
from actvar_convert.measure.latency import hardware_name
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model
from actvar_convert.models.var.tokenizer import FAST_DECODERS
from actvar_convert.system.device import DTYPES, limit_threads

D16_PLAN = ("budget.reduction=0.4", "budget.gate_keep=0.6", "budget.gate_scales=2", "budget.prefix_share=1.0")
"""No routing: on a CPU it costs more than it saves (docs/experiments.md), as in the recipe ``fashion``."""
CPU = torch.device("cpu")

REALISED = {"fashion": {1: 0.65, 4: 0.70, 16: 0.80}, "d16": {1: 0.75, 4: 0.85, 16: 0.85}}
"""The least share of the promised speed-up of tokens, by model and batch; small models cannot realise everything."""

DENSE_OVER_PLAIN = {"d16": 1.25}
"""The least speed-up of the dense model over the plain path, for images: both differ in the decoder too."""


class Given(argparse.Namespace):
    """The command line."""

    models: list[str]
    batches: list[int]
    dtypes: list[str]
    extents: list[str]
    repeats: int | None
    sparse: Path | None
    out: Path | None


def models(name: str, sparse_folder: Path | None) -> tuple[Model, Model]:
    """The dense and the sparse model of one name, in fp32."""
    if name == "fashion":
        dense = av.load("fashion", device="cpu")
        if sparse_folder is not None:
            sparse = av.load(sparse_folder, device="cpu")
            assert isinstance(sparse, Model)
            return dense, sparse
        return dense, av.convert(dense, recipe="fashion")
    dense = random_dense(name, CPU, torch.float32)
    return dense, random_sparse(dense, recipe_plan(dense.config, f"var_{name}", D16_PLAN))


def goals(name: str, batch: int, images: bool) -> list[Goal]:
    """What a row has to reach: tokens their share of the promise, images of d16 a lead over the plain path."""
    if images:
        return [Goal("dense/plain", DENSE_OVER_PLAIN[name])] if name in DENSE_OVER_PLAIN else []
    return [Goal("realised", least) for size, least in REALISED.get(name, {}).items() if size == batch]


def repeats_of(name: str, dtype: str, batch: int, images: bool) -> int:
    """Timed runs that the time allows: in fp32 16 images take d16 most of a minute, its decoder seconds an image."""
    if name == "fashion":
        return 5
    return 1 if images or (dtype == "fp32" and batch > 4) else 3


def in_format(model: Model, dtype: str) -> Model:
    """The model in a dtype, its decoder too where that is faster."""
    fast = DTYPES[dtype] in FAST_DECODERS["cpu"]
    return cast(model, DTYPES[dtype], decoder=DTYPES[dtype] if fast else torch.float32)


def rows_of(
    name: str, dense: Model, sparse: Model, plain: PlainGeneration, dtype: str, batch: int, given: Given
) -> list[Row]:
    """One row per extent."""
    if dtype == "fp32" and batch <= 4 and name == "fashion":
        assert same_tokens(plain, dense, batch) == 1, "the plain path and the dense model draw different tokens"
    routing = "as learnt" if sparse.origin else "as converted" if name == "fashion" else "static"
    extents = given.extents
    if batch > 1 and name != "fashion":
        extents = [each for each in extents if each == "tokens"]  # the decoder of d16 costs seconds per image
    return [
        measure(
            name,
            dtype,
            plain,
            dense,
            sparse,
            batch,
            given.repeats or repeats_of(name, dtype, batch, extent == "images"),
            plain_repeats=1 if given.repeats is None and name != "fashion" else None,
            images=extent == "images",
            routing=routing,
            goals=goals(name, batch, extent == "images"),
        )
        for extent in extents
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fashion", "d16"], choices=["fashion", "d16", "d20", "d24"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="images at once")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument(
        "--repeats", type=int, help="timed runs per side (fashion 5; others 3, less where a run takes long, plain 1)"
    )
    parser.add_argument("--sparse", type=Path, help="sparse folder made from fashion; default: convert it now")
    parser.add_argument("--out", type=Path, help="JSON file to write, after every row")
    parser.add_argument("--extents", nargs="+", default=["tokens", "images"], choices=["tokens", "images"])
    given = parser.parse_args(namespace=Given())
    limit_threads()
    print(f"{hardware_name(CPU)}, {torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)
    results = Results(CPU, given.out)
    for name in given.models:
        dense, sparse = models(name, given.sparse)
        for dtype in given.dtypes:
            cast_dense, cast_sparse = in_format(dense, dtype), in_format(sparse, dtype)
            assert isinstance(cast_sparse, Model)
            plain = PlainGeneration(cast_dense, dense.tokenizer)
            for batch in given.batches:
                results.add(rows_of(name, cast_dense, cast_sparse, plain, dtype, batch, given))


if __name__ == "__main__":
    main()
