"""What the speed benchmarks have in common: models at exact size, alternating timings, one row, one table, one file."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from plain import PlainGeneration

from actvar_convert.conversion.budget import uniform_plan
from actvar_convert.cost.flops import count_flops
from actvar_convert.files.layout import official_config
from actvar_convert.measure.latency import hardware_name
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.split import expert_ffns, stored_name
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.load import load_recipe
from actvar_convert.system.device import peak_memory_bytes, reset_peak_memory, synchronize

Measure = Literal["dense/plain", "speed-up", "realised"]


class Goal(NamedTuple):
    """The least that a ratio of a row has to be."""

    measure: Measure
    least: float


@dataclass(frozen=True)
class Row:
    """Median milliseconds of one batch; a side that was not run is None."""

    model: str
    dtype: str
    batch: int
    extent: str
    routing: str
    plain_ms: float | None
    dense_ms: float
    sparse_ms: float | None
    promised: float | None
    spread: float
    peak_memory_bytes: int
    repeats: int
    goal: str = "-"

    @property
    def ratios(self) -> dict[Measure, float | None]:
        speedup = self.dense_ms / self.sparse_ms if self.sparse_ms else None
        return {
            "dense/plain": self.plain_ms / self.dense_ms if self.plain_ms else None,
            "speed-up": speedup,
            "realised": speedup / self.promised if speedup and self.promised else None,
        }

    def judged(self, goals: Sequence[Goal]) -> Row:
        """The row with its last column: met, missed with what was asked for, or - where nothing is."""
        asked = [goal for goal in goals if self.ratios[goal.measure] is not None]
        missed = [goal for goal in asked if (self.ratios[goal.measure] or 0.0) < goal.least]
        said = ", ".join(f"{goal.measure} {goal.least:g}" for goal in missed)
        return replace(self, goal=f"missed: {said}" if missed else "met" if asked else "-")

    @property
    def cells(self) -> list[str]:
        over_plain, speedup, realised = self.ratios.values()
        return [
            self.model,
            self.dtype,
            str(self.batch),
            self.extent,
            self.routing,
            *(f"{value:.1f}" if value else "-" for value in (self.plain_ms, self.dense_ms, self.sparse_ms)),
            *(f"{value:.2f}" if value else "-" for value in (over_plain, speedup, self.promised, realised)),
            f"{100 * self.spread:.0f}",
            self.goal,
        ]


HEADINGS = ["model", "dtype", "batch", "extent", "routing", "plain ms", "dense ms", "sparse ms"]
HEADINGS += ["dense/plain", "speed-up", "promised", "realised", "spread %", "goal"]


class Results:
    """Rows as they come: each is printed and, with everything before it, written at once, so a failure loses none."""

    def __init__(self, device: torch.device, out: Path | None) -> None:
        self.rows: list[Row] = []
        self._device, self._out = device, out

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            lines = table([*self.rows, row]).splitlines()
            print("\n".join(lines[-1:] if self.rows else lines), flush=True)
            self.rows.append(row)
            if self._out is not None:
                write_json(self._out, self.rows, self._device)


def random_dense(
    name: str, device: torch.device, dtype: torch.dtype, *, depth: int | None = None, tiny: bool = False
) -> Model:
    """A published model's shape with random weights, transformer and decoder in ``dtype``; on a CPU it decodes in fp32.

    Args:
        depth: blocks, where fewer than all will do.
        tiny: two narrow blocks and maps of 1 to 16 tokens, where only the lines that run matter.
    """
    config, tokenizer_config = official_config(f"var-{name}")
    if tiny:
        small: dict[str, Any] = {"sides": (1, 2, 3, 4), "vocab": 64}
        config = config.model_copy(update=small | {"depth": 2, "width": 64, "heads": 2, "hidden": 256})
        tokenizer_config = tokenizer_config.model_copy(update=small | {"ch": 32, "ch_mult": (1, 2), "res_blocks": 1})
    if depth is not None:
        config = config.model_copy(update={"depth": depth})
    torch.manual_seed(0)
    with torch.device(device):
        transformer, tokenizer = VARTransformer(config).to(dtype), VQVAE(tokenizer_config)
    model = Model(transformer, tokenizer).eval().requires_grad_(False)
    return model if device.type == "cpu" else cast(model, dtype, decoder=dtype)


def recipe_plan(config: TransformerConfig, recipe: str, overrides: Sequence[str]) -> SparsityPlan:
    """The uniform plan that a shipped recipe leads to for a model's shape: random weights give a search no clue."""
    return uniform_plan(config, load_recipe(recipe, overrides))


def random_sparse(dense: Model, plan: SparsityPlan, *, skewed: bool = False) -> Model:
    """The dense weights themselves, not a copy, with random routers and gates; see ``lean`` for the routers."""
    with torch.device(dense.device):
        model = fresh_sparse(dense.config, dense.tokenizer, {"plan": plan}, "plan", dense.sampling)
    model.transformer.to(dense.dtype)
    state = dense.transformer.state_dict()
    own = {name: state[stored_name(name)] for name in model.transformer.state_dict() if stored_name(name) in state}
    model.transformer.load_state_dict(own, strict=False, assign=True)
    model.eval().requires_grad_(False)
    lean(model, skewed=skewed)
    return model


def lean(sparse: Model, *, skewed: bool) -> None:
    """Makes random routers balanced or skewed, in place, so that what was recorded of the model stays right.

    Balanced ones have no bias. Skewed ones favour experts linearly, by three standard deviations of a score from the
    first to the last, so that the busiest experts take several times the rows of the idle ones.
    """
    for ffn in expert_ffns(sparse.transformer):
        if ffn.router is not None:
            bias = ffn.router.linear.bias.data
            deviation = 3**-0.5  # weights uniform within 1 / sqrt(C), inputs of unit variance
            towards = torch.linspace(1.5, -1.5, len(bias), device=bias.device, dtype=bias.dtype)
            bias.copy_(deviation * towards if skewed else torch.zeros_like(towards))


class Timing(NamedTuple):
    """Of one side: median milliseconds, and the range of the repeats over it."""

    ms: float
    spread: float


def alternate(
    sides: Mapping[str, Callable[[], object]], repeats: Mapping[str, int], device: torch.device
) -> tuple[dict[str, Timing], int]:
    """Timings per side, and the peak memory; one run each to warm up, then in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    reset_peak_memory(device)
    for repeat in range(max(repeats.values()) + 1):
        for name, run in sides.items():
            if repeat > repeats[name]:
                continue
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    timings = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        timings[name] = Timing(1000 * median, (max(values) - min(values)) / median)
    return timings, peak_memory_bytes(device)


def measure(
    model: str,
    dtype: str,
    plain: PlainGeneration,
    dense: Model,
    sparse: Model,
    batch: int,
    repeats: int,
    *,
    plain_repeats: int | None = None,
    images: bool = False,
    routing: str,
    goals: Sequence[Goal] = (),
) -> Row:
    """The row of one batch size: the three sides in turn, on the dense model's device.

    Args:
        model, dtype, routing: what the row calls them.
        plain, dense, sparse: the same weights.
        batch: images at once, labels in turn.
        repeats: timed runs per side, ``plain_repeats`` of the plain one.
        images: with the decoder; otherwise tokens alone.
        goals: what the row has to reach.
    """
    verb, labels = "generate" if images else "generate_tokens", labels_of(dense, batch)
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: getattr(plain, verb)(labels),
        "dense": lambda: getattr(dense, verb)(labels, chunk=batch),
        "sparse": lambda: getattr(sparse, verb)(labels, chunk=batch),
    }
    counts = dict.fromkeys(sides, repeats) | {"plain": plain_repeats or repeats}
    timings, peak = alternate(sides, counts, dense.device)
    return Row(
        model=model,
        dtype=dtype,
        batch=batch,
        extent="images" if images else "tokens",
        routing=routing,
        plain_ms=timings["plain"].ms,
        dense_ms=timings["dense"].ms,
        sparse_ms=timings["sparse"].ms,
        promised=promised(sparse, images),
        spread=max(timing.spread for timing in timings.values()),
        peak_memory_bytes=peak,
        repeats=repeats,
    ).judged(goals)


def labels_of(model: Model, batch: int) -> list[int]:
    """Classes in turn."""
    return [index % model.config.classes for index in range(batch)]


def same_tokens(plain: PlainGeneration, dense: Model, batch: int) -> float:
    """Share of the tokens that the plain path draws as the dense model does."""
    labels = labels_of(dense, batch)
    drawn, expected = plain.generate_tokens(labels), dense.generate_tokens(labels, chunk=batch)
    return float((drawn == expected).double().mean())


def promised(sparse: Model, with_decoder: bool) -> float:
    """Dense FLOPs over sparse FLOPs of the active plan."""
    counted = count_flops(sparse.config, sparse.tokenizer.config, {"plan": sparse.plan}, "plan")
    value = counted.promised_speedup(with_decoder)
    assert value is not None
    return value


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_json(path: Path, rows: Sequence[Row], device: torch.device) -> None:
    """Everything that was measured, with the machine it was measured on."""
    content = {
        "schema": "actvar.speed/1",
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
