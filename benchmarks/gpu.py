"""Speed on one GPU: plain, dense and sparse generation at the exact sizes of d16, d24 and d30, in bf16.

    python benchmarks/gpu.py --out gpu.json

Random weights cost what real ones cost. Routing is measured balanced and skewed, at batch 1 and 64, with a plan of 40 %
fewer transformer FLOPs. Times are of tokens, noise included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from plain import PlainGeneration
from sides import Row, alternate, promised, random_dense, random_sparse, recipe_plan, table, write_json

from actvar_convert.report.latency import hardware_name


def measure(name: str, device: torch.device, batches: list[int], repeats: int, reduction: float) -> list[Row]:
    """The rows of one model: per batch size and routing."""
    dense = random_dense(name, device, torch.bfloat16)
    overrides = (f"budget.reduction={reduction}", "budget.gate_keep=0.6", "budget.gate_scales=2")
    plan = recipe_plan(dense, f"var_{name}", overrides)
    plain = PlainGeneration(dense)
    rows = []
    for routing in ("balanced", "skewed"):
        sparse = random_sparse(dense, plan, skewed=routing == "skewed")
        for batch in batches:
            labels = [index % dense.transformer.config.classes for index in range(batch)]
            sides = {
                "plain": lambda labels=labels: plain.generate_tokens(labels),
                "dense": lambda labels=labels: dense.generate_tokens(labels, chunk=len(labels)),
                "sparse": lambda labels=labels, own=sparse: own.generate_tokens(labels, chunk=len(labels)),
            }
            ms, spread, peak = alternate(sides, repeats, device)
            rows.append(
                Row(
                    model=name,
                    dtype="bf16",
                    batch=batch,
                    extent="tokens",
                    routing=routing,
                    plain_ms=ms["plain"],
                    dense_ms=ms["dense"],
                    sparse_ms=ms["sparse"],
                    promised=promised(sparse, False),
                    spread=spread,
                    peak_memory_bytes=peak,
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["d16", "d24", "d30"], choices=["d16", "d20", "d24", "d30"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="images at once")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per side")
    parser.add_argument("--reduction", type=float, default=0.4, help="share of the transformer's FLOPs that is saved")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a GPU: torch sees no CUDA device here. benchmarks/cpu.py measures the CPU.")
    device = torch.device("cuda")
    rows: list[Row] = []
    for name in given.models:
        rows += measure(name, device, given.batches, given.repeats, given.reduction)
        torch.cuda.empty_cache()
    print(f"{hardware_name(device)}, torch {torch.__version__}\n")
    print(table(rows))
    if given.out is not None:
        write_json(given.out, rows, device, given.repeats)


if __name__ == "__main__":
    main()
