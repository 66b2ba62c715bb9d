"""Speed on the CPU: plain, dense and sparse generation of ``fashion`` and of d16's exact shape.

    python benchmarks/cpu.py --out cpu.json

Two cores take about ten minutes. Three sides alternate: the straightforward implementation (``plain.py``), the dense
model and a sparse one. ``fashion`` runs the plan of its recipe, or that of the folder given with --sparse; d16 has
random weights and a plan of 40 % fewer transformer FLOPs. The extent ``images`` adds the decoder to ``tokens``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from plain import PlainGeneration
from sides import Row, measure, random_dense, random_sparse, recipe_plan, table, write_json

import actvar_convert as av
from actvar_convert.models.casting import cast
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.report.latency import hardware_name
from actvar_convert.runtime import DTYPES, limit_threads

D16_PLAN = ("budget.reduction=0.4", "budget.gate_keep=0.6", "budget.gate_scales=2")
CPU = torch.device("cpu")
REPEATS = {"fashion": 5}


class Given(argparse.Namespace):
    """The command line."""

    models: list[str]
    batches: list[int]
    dtypes: list[str]
    extents: list[str]
    repeats: int | None
    sparse: Path | None
    out: Path | None


def models(name: str, sparse_folder: Path | None) -> tuple[VARModel, SparseVARModel]:
    """The dense and the sparse model of one name, in fp32."""
    if name == "fashion":
        dense = av.load("fashion", device="cpu")
        if sparse_folder is not None:
            sparse = av.load(sparse_folder, device="cpu")
            assert isinstance(sparse, SparseVARModel)
            return dense, sparse
        return dense, av.convert(dense, recipe="fashion")
    dense = random_dense(name, CPU, torch.float32)
    return dense, random_sparse(dense, recipe_plan(dense, f"var_{name}", D16_PLAN))


def rows_of(
    name: str, dense: VARModel, sparse: SparseVARModel, plain: PlainGeneration, dtype: str, batch: int, given: Given
) -> list[Row]:
    """One row per extent."""
    if dtype == "fp32" and batch <= 4 and name == "fashion":
        labels = [index % dense.transformer.config.classes for index in range(batch)]
        assert torch.equal(plain.generate_tokens(labels), dense.generate_tokens(labels, chunk=batch))
    repeats = given.repeats or REPEATS.get(name, 1)
    routing = "as learnt" if sparse.origin else "as converted" if name == "fashion" else "random"
    extents = given.extents
    if batch > 1 and name != "fashion":
        extents = [each for each in extents if each == "tokens"]  # the decoder of d16 costs seconds per image
    return [
        measure(name, dtype, plain, dense, sparse, batch, repeats, images=extent == "images", routing=routing)
        for extent in extents
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fashion", "d16"], choices=["fashion", "d16", "d20", "d24"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="images at once")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, help="timed runs per side (fashion 5, others 1)")
    parser.add_argument("--sparse", type=Path, help="sparse folder made from fashion, instead of random routers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--extents", nargs="+", default=["tokens", "images"], choices=["tokens", "images"])
    given = parser.parse_args(namespace=Given())
    limit_threads()
    rows: list[Row] = []
    for name in given.models:
        dense, sparse = models(name, given.sparse)
        for dtype in given.dtypes:
            cast_dense, cast_sparse = cast(dense, DTYPES[dtype]), cast(sparse, DTYPES[dtype])
            assert isinstance(cast_sparse, SparseVARModel)
            for batch in given.batches:
                plain = PlainGeneration(cast_dense, dense.tokenizer)
                rows += rows_of(name, cast_dense, cast_sparse, plain, dtype, batch, given)
    print(f"{hardware_name(CPU)}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(rows))
    if given.out is not None:
        write_json(given.out, rows, CPU, given.repeats)


if __name__ == "__main__":
    main()
