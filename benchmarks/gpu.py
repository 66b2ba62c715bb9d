"""Speed on one GPU: plain, dense and sparse generation at the exact sizes of d16, d24 and d30, in bf16.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --dry-run

The second runs the same lines on a CPU with tiny models, and no graphs: to see that they work. Its times mean nothing.

The plain path starts every kernel from Python; the dense and the sparse model replay CUDA graphs. Random weights cost
what real ones cost. Plans save 40 and 50 % of the transformer's FLOPs: with routing, which is measured balanced and
skewed, and without (``static``: experts that every token runs, the baseline that routing has to beat). Times are of
tokens, noise included. A side runs once per batch: the plain one at batch 1, and for d16 at the others too.

Before the table stand the choices that the code makes for a GPU, each beside its alternative (fused kernels beside
grouped products, graphs beside ``torch.compile``), and three checks: that the plain path draws the dense model's tokens
in fp32, and that graphs draw what the dense and the sparse model draw without them.
Rows are printed and written as they are finished; after --minutes no further one is begun, and what is
left out is named. The last column says whether a row reaches what the project asks of an H200: see ``goals``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from plain import PlainGeneration
from sides import (
    Goal,
    Results,
    Row,
    Timing,
    alternate,
    labels_of,
    lean,
    promised,
    random_dense,
    random_sparse,
    recipe_plan,
    same_tokens,
)
from torch import Tensor

from actvar_convert.kernels.expert_ffn import (
    expert_ffn_masked,
    expert_ffn_prefix,
    expert_ffn_triton,
    selection_mask,
    triton_works,
)
from actvar_convert.kernels.expert_weights import ExpertWeights
from actvar_convert.kernels.linear import linear_gelu, linear_gelu_reference
from actvar_convert.measure.latency import hardware_name
from actvar_convert.models.model import Model
from actvar_convert.models.var import tokenizer as vqvae
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.system.device import synchronize

ROUTINGS = ("static", "balanced", "skewed")


class Deadline:
    """When no further row is begun, and what was left out, for that reason or another."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        """Whether there is time; what there is none for is noted."""
        if self._now() < self._end:
            return True
        self.left_out.append(f"{what} (no time)")
        return False

    @contextmanager
    def memory_for(self, what: str) -> Iterator[None]:
        """Work that may be too large for the device: the other rows are still worth having."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.left_out.append(f"{what} (out of memory)")


class Settings(NamedTuple):
    """What is measured of every model; of a tiny one in its place if ``tiny``."""

    batches: list[int]
    repeats: int
    reductions: list[float]
    tiny: bool = False


def goals(batch: int) -> list[Goal]:
    """What the project asks of a row: of few images the launches that graphs save, of many the arithmetic."""
    if batch == 1:
        return [Goal("dense/plain", 3.0), Goal("speed-up", 1.0)]
    return [Goal("realised", 0.85)] if batch >= 64 else []


def plan_of(config: TransformerConfig, name: str, reduction: float, *, routed: bool) -> SparsityPlan:
    """A plan that saves a share of the transformer's FLOPs, with half of the active experts routed, or none.

    Larger cuts gate more tokens, so that some experts are left for every block to choose from.
    """
    keep, scales = (0.6, 2) if reduction <= 0.42 else (0.5, 3)
    share = (f"budget.prefix_share={0.5 if routed else 1.0}",)
    settings = f"budget.reduction={reduction}", f"budget.gate_keep={keep}", f"budget.gate_scales={scales}", *share
    return recipe_plan(config, f"var_{name}", settings)


def rows_of(name: str, device: torch.device, settings: Settings, deadline: Deadline) -> Iterator[Row]:
    """The rows of one model as they are finished: per plan, batch size and routing."""
    if not deadline.allows(name):
        return
    dense = random_dense(name, device, torch.bfloat16, tiny=settings.tiny)
    plain = PlainGeneration(dense)
    whole: dict[int, tuple[Timing | None, Timing]] = {}
    for batch in settings.batches:
        what = f"{name} dense, batch {batch}"
        if deadline.allows(what):
            with deadline.memory_for(what):
                before, labels = None, labels_of(dense, batch)
                if batch == 1 or name == "d16":
                    before, _ = timed(partial(plain.generate_tokens, labels), settings, device)
                whole[batch] = before, recorded(dense, batch, settings, device)[0]
            dense.recordings.clear()
    for reduction in settings.reductions:
        for routed in (False, True):
            sparse = random_sparse(dense, plan_of(dense.config, name, reduction, routed=routed))
            for batch, (plain_timing, dense_timing) in whole.items():
                for routing in ROUTINGS[1:] if routed else ROUTINGS[:1]:
                    what, measured = f"{name} {routing} {100 * reduction:.0f} %, batch {batch}", None
                    if deadline.allows(what):
                        with deadline.memory_for(what):
                            lean(sparse, skewed=routing == "skewed")
                            measured = recorded(sparse, batch, settings, device)
                    if measured is None:
                        continue
                    sparse_timing, peak = measured
                    timings = [timing for timing in (plain_timing, dense_timing, sparse_timing) if timing]
                    yield Row(
                        model=f"{name} (tiny)" if settings.tiny else name,
                        dtype="bf16",
                        batch=batch,
                        extent="tokens",
                        routing=f"{routing} {100 * reduction:.0f} %",
                        plain_ms=plain_timing.ms if plain_timing else None,
                        dense_ms=dense_timing.ms,
                        sparse_ms=sparse_timing.ms,
                        promised=promised(sparse, False),
                        spread=max(timing.spread for timing in timings),
                        peak_memory_bytes=peak,
                        repeats=settings.repeats,
                    ).judged(goals(batch))
                sparse.recordings.clear()


def timed(run: Callable[[], object], settings: Settings, device: torch.device) -> tuple[Timing, int]:
    """Time and peak memory of one side alone."""
    torch.cuda.empty_cache()
    timings, peak = alternate({"own": run}, {"own": settings.repeats}, device)
    return timings["own"], peak


def recorded(model: Model, batch: int, settings: Settings, device: torch.device) -> tuple[Timing, int]:
    """Time and peak memory of tokens by CUDA graphs, which the warm-up records unless they are there already."""
    labels = labels_of(model, batch)
    return timed(lambda: model.generate_tokens(labels, chunk=batch, compile=device.type == "cuda"), settings, device)


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of one call, after two to warm up."""
    seconds = []
    for repeat in range(repeats + 2):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        if repeat >= 2:
            seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


@torch.inference_mode()
def choices(dense: Model, rows: int, batches: Sequence[int]) -> Iterator[str]:
    """Lines about what the code chooses on a GPU, with the shapes of a model.

    Args:
        dense: the model.
        rows: tokens that an FFN gets at once.
        batches: images at once, of the decoder and of whole generations.
    """
    ffn, device, dtype = dense.transformer.blocks[0].ffn, dense.device, dense.dtype
    x = torch.randn(rows, dense.config.width, device=device, dtype=dtype)
    fused, written = (
        milliseconds(partial(layer, x, ffn.fc1.weight, ffn.fc1.bias), device)
        for layer in (linear_gelu, linear_gelu_reference)
    )
    yield f"linear layer with GELU, {len(x)} rows: fused {fused:.3f} ms, as written {written:.3f} ms"
    weights = ExpertWeights(ffn.fc1.weight, ffn.fc1.bias, ffn.fc2.weight, ffn.fc2.bias, experts=8)
    chosen = torch.rand(rows, 6, device=device).topk(3, sorted=False).indices
    ways: dict[str, Callable[[], object]] = {
        "grouped_mm": lambda: grouped_ffn(x, weights, 2, chosen),
        "all experts, masked": lambda: expert_ffn_masked(x, weights, 2, selection_mask(chosen, 6)),
    }
    if triton_works(device):
        ways = {"fused kernels": lambda: expert_ffn_triton(x, weights, 2, chosen)} | ways
    said = ", ".join(f"{name} {milliseconds(way, device):.3f} ms" for name, way in ways.items())
    yield f"expert FFN, 2 of 8 experts always and 3 routed, {len(x)} rows: {said}"
    for batch in batches:
        tokens = torch.randint(dense.config.vocab, (batch, dense.config.schedule.total))
        scales = dense.split(tokens.to(device))
        kept, times = vqvae.CHANNELS_LAST, []
        for vqvae.CHANNELS_LAST in (kept, ()):
            times.append(milliseconds(partial(dense.tokenizer.decode, scales), device))
        vqvae.CHANNELS_LAST = kept
        yield f"decoder in bf16, batch {batch}: channels last {times[0]:.1f} ms, default {times[1]:.1f} ms"
    for batch in batches:
        made = partial(dense.generate_tokens, labels_of(dense, batch), chunk=batch)
        times = [milliseconds(partial(made, compile=device.type == "cuda"), device, repeats=3)]
        dense.recordings.clear()
        with compiled_blocks(dense):
            times.append(milliseconds(made, device, repeats=3))
        yield f"dense tokens, batch {batch}: CUDA graphs {times[0]:.1f} ms, torch.compile {times[1]:.1f} ms"


def grouped_ffn(x_RC: Tensor, weights: ExpertWeights, prefix: int, chosen_RK: Tensor) -> Tensor:
    """The expert FFN by torch's grouped products: a copy of a row for every expert that it chose. Returns [R, C]."""
    E, K, C = weights.experts, chosen_RK.shape[1], x_RC.shape[1]
    experts, order = chosen_RK.flatten().sort()
    rows = order // K
    ends = torch.searchsorted(experts, torch.arange(E - prefix, device=experts.device), right=True, out_int32=True)
    w1_ECN = weights.w1.view(E, -1, C).transpose(1, 2)
    w2_ENC = weights.w2.view(C, E, -1).permute(1, 2, 0)
    hidden = F.grouped_mm(x_RC[rows], w1_ECN[prefix:], offs=ends) + weights.b1.view(E, -1)[prefix:][experts]
    out = F.grouped_mm(F.gelu(hidden, approximate="tanh"), w2_ENC[prefix:], offs=ends)
    return expert_ffn_prefix(x_RC, weights, prefix).index_add_(0, rows, out)


@contextmanager
def compiled_blocks(model: Model) -> Iterator[None]:
    """Meanwhile the blocks are compiled, once per scale; on a CPU traced alone, since compiling takes minutes."""
    blocks, limits = list(model.transformer.blocks), torch._dynamo.config
    backend = "inductor" if model.device.type == "cuda" else "eager"
    with limits.patch(recompile_limit=64, accumulated_recompile_limit=4096):
        for block in blocks:
            block.compile(backend=backend, dynamic=False)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
            torch._dynamo.reset()


def checks(dense: Model, device: torch.device, *, tiny: bool) -> Iterator[str]:
    """Lines about whether the sides draw the same tokens."""
    small = random_dense("d16", device, torch.float32, depth=2, tiny=tiny)
    same = same_tokens(PlainGeneration(small), small, 4)
    yield f"tokens that the plain path draws as the dense model does, fp32, 2 blocks: {100 * same:.2f} %"
    sparse = random_sparse(dense, plan_of(dense.config, "d16", 0.4, routed=True))
    for side, model in (("dense", dense), ("sparse", sparse)):
        yield f"tokens that graphs draw as the {side} model does without them: {100 * agreement(model):.2f} %"
        model.recordings.clear()


def agreement(model: Model) -> float:
    """Share of the tokens that the graphs draw as the same model does without them."""
    eager, replayed = (
        model.generate_tokens(labels_of(model, 4), compile=graphs) for graphs in (False, model.device.type == "cuda")
    )
    return float((eager == replayed).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["d16", "d24", "d30"], choices=["d16", "d20", "d24", "d30"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="images at once")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs per side")
    parser.add_argument(
        "--reductions", nargs="+", type=float, default=[0.4, 0.5], help="shares of the transformer's FLOPs to save"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no further row is begun")
    parser.add_argument("--out", type=Path, help="JSON file to write, after every row")
    parser.add_argument("--dry-run", action="store_true", help="the same lines on the CPU, with tiny models")
    given = parser.parse_args()
    dry: bool = given.dry_run
    if not dry and not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu.py needs a GPU: torch sees no CUDA device here. benchmarks/cpu.py measures the CPU; "
            "--dry-run tries every line of this benchmark on it."
        )
    device, deadline = torch.device("cpu" if dry else "cuda"), Deadline(given.minutes)
    print(f"{hardware_name(device)}, torch {torch.__version__}{', a dry run: times mean nothing' if dry else ''}\n")
    dense = random_dense("d16", device, torch.bfloat16, tiny=dry)
    rows, batches = (64, [1, 2]) if dry else (64 * 2 * 256, [1, 16])
    for lines in (choices(dense, rows, batches), checks(dense, device, tiny=dry)):
        for line in lines:
            print(line, flush=True)
    print(flush=True)
    del dense
    results = Results(device, given.out)
    settings = Settings([1, 3] if dry else given.batches, 1 if dry else given.repeats, given.reductions, tiny=dry)
    for name in given.models:
        torch.cuda.empty_cache()
        results.add(rows_of(name, device, settings, deadline))
    if deadline.left_out:
        print(f"\nleft out: {'; '.join(deadline.left_out)}")


if __name__ == "__main__":
    main()
