"""How the expert FFNs of a sparse model would be computed on its device, per scale and batch size, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actvar_convert.errors import InputError
from actvar_convert.kernels.expert_ffn import triton_works
from actvar_convert.kernels.ways import FFNShape, WayRow, way_table
from actvar_convert.models.config import TransformerConfig
from actvar_convert.models.model import VARModel
from actvar_convert.models.plan import SparsityPlan
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.runtime import DTYPES


class PlanWay(NamedTuple):
    """The way of all blocks that run the same setting at one scale.

    Attributes:
        scale: index, coarse to fine.
        blocks: number of such blocks.
        row: shape, choice and reason.
    """

    scale: int
    blocks: int
    row: WayRow


def plan_ways(
    config: TransformerConfig, plan: SparsityPlan, *, batch: int, dtype: torch.dtype, device: str, triton: bool
) -> list[PlanWay]:
    """The choices of a plan at inference with guidance; scales that run every expert are left out.

    Args:
        config: of the transformer.
        plan: what each block runs.
        batch: images at once, of one or two rows as the plan says.
        dtype: of the weights.
        device: its type, such as cpu or cuda; it need not be there.
        triton: whether the fused kernels run on it.
    """
    counts: dict[tuple[int, FFNShape], int] = {}
    for scale, length in enumerate(config.pyramid.lengths):
        for index, block in enumerate(plan.blocks):
            if plan.runs_all(index, scale):
                continue
            dynamic = block.tau(scale) is not None
            shape = FFNShape(
                device=device,
                dtype=dtype,
                rows=plan.rows * batch * block.kept(scale, length),
                width=config.width,
                neurons=config.hidden // plan.experts,
                experts=plan.experts,
                prefix=block.prefix[scale],
                routed=None if dynamic else block.routed[scale],
            )
            counts[scale, shape] = counts.get((scale, shape), 0) + 1
    rows = way_table((shape for _, shape in counts), triton=triton)
    return [PlanWay(scale, blocks, row) for ((scale, _), blocks), row in zip(counts.items(), rows, strict=True)]


def render_ways(model: VARModel, batches: Sequence[int], dtypes: Sequence[str]) -> RenderableType:
    """The table for the plan that a sparse model runs, on the device it is on.

    Raises:
        InputError: the model is dense, or a number format has no such name.
    """
    if not isinstance(model, SparseVARModel):
        raise InputError("the model is dense: only the FFNs of a sparse model have experts to choose a way for")
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise InputError(f"dtype: {', '.join(unknown)} given, possible are {', '.join(DTYPES)}")
    device = model.device
    triton = device.type == "cuda" and triton_works(device)
    table = Table(title=f"expert FFNs on {device}, plan {model.plan_name}", box=box.SIMPLE)
    for name in ("dtype", "batch", "scale", "blocks", "rows", "prefix", "routed", "of", "way", "why"):
        table.add_column(name, justify="left" if name in ("dtype", "way", "why") else "right")
    for dtype in dtypes:
        for batch in batches:
            for scale, blocks, (shape, choice, counted) in plan_ways(
                model.transformer.config,
                model.plans[model.plan_name],
                batch=batch,
                dtype=DTYPES[dtype],
                device=device.type,
                triton=triton,
            ):
                routed = "varies" if shape.routed is None else str(shape.routed)
                figures = ", ".join(f"{way} {each:.0f} us" for way, each in counted.items())
                numbers = (batch, scale, blocks, shape.rows, shape.prefix)
                reason = f"{choice.reason} ({figures})" if figures else choice.reason
                table.add_row(dtype, *map(str, numbers), routed, str(shape.free), choice.way, reason)
    return Group(table, Text(_note(model, device.type), style="dim"))


def _note(model: SparseVARModel, device: str) -> str:
    """What rows and microseconds mean for a model on a device."""
    rows = "one per image, guidance is folded in"
    if model.plan.rows == 2:
        rows = "two per image, with its class and without"
    machine = {"cpu": "two cores with AVX-512", "cuda": "a large GPU"}.get(device)
    counted = f" Microseconds: beyond the prefix, counted for {machine}, not measured." if machine else ""
    return f"Rows: {rows}.{counted}"
