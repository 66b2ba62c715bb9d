"""How the expert FFNs of a sparse model would be computed on its device, per scale and batch size, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actvar_convert.errors import InputError
from actvar_convert.kernels.expert_ffn import triton_works
from actvar_convert.kernels.ways import FFNShape, Way, WayRow, way_table
from actvar_convert.models.config import TransformerConfig
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.plan import SparsityPlan
from actvar_convert.system.device import DTYPES


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
            shape = FFNShape(
                device=device,
                dtype=dtype,
                rows=plan.rows * batch * block.kept(scale, length),
                width=config.width,
                neurons=config.hidden // plan.experts,
                experts=plan.experts,
                prefix=block.prefix[scale],
                routed=block.routed[scale],
            )
            counts[scale, shape] = counts.get((scale, shape), 0) + 1
    rows = way_table((shape for _, shape in counts), triton=triton)
    return [PlanWay(scale, blocks, row) for ((scale, _), blocks), row in zip(counts.items(), rows, strict=True)]


class WaysRow(BaseModel):
    """How all blocks that run the same setting at one scale compute their FFN, at one batch size and number format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    batch: int = Field(description="images at once")
    scale: int = Field(description="index, coarse to fine")
    blocks: int = Field(description="how many do")
    rows: int = Field(description="rows of one FFN call")
    prefix: int = Field(description="experts that every row runs")
    routed: int = Field(description="experts picked per row")
    free: int = Field(description="experts to pick from")
    way: Way
    reason: str
    microseconds: dict[Way, float] = Field(description="of each way, beyond the prefix, as counted; not measured")


class WaysReport(BaseModel):
    """How the expert FFNs of a sparse model would be computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["actvar.ways/1"] = Field(default="actvar.ways/1", alias="schema")
    device: str
    plan: str
    note: str = Field(description="what rows and microseconds mean")
    rows: tuple[WaysRow, ...]

    def to_json(self) -> str:
        """The report as one JSON object, schema ``actvar.ways/1``."""
        return self.model_dump_json(by_alias=True, indent=2)


def ways_report(model: VARModel, batches: Sequence[int], dtypes: Sequence[str]) -> WaysReport:
    """The choices for the plan that a sparse model runs, on the device it is on.

    Raises:
        InputError: the model is dense, a batch has no image, or a number format has no such name.
    """
    if not isinstance(model, SparseVARModel):
        raise InputError("the model is dense: only the FFNs of a sparse model have experts to choose a way for")
    problems = []
    if not batches or min(batches) < 1:
        problems.append(f"batches: {list(batches)} given, one or more numbers of at least 1 needed")
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        problems.append(f"dtype: {', '.join(unknown)} given, possible are {', '.join(DTYPES)}")
    if problems:
        raise InputError("no way can be chosen for this:", problems)
    device = model.device
    triton = device.type == "cuda" and triton_works(device)
    rows = [
        WaysRow(
            dtype=dtype,
            batch=batch,
            scale=scale,
            blocks=blocks,
            rows=shape.rows,
            prefix=shape.prefix,
            routed=shape.routed,
            free=shape.free,
            way=choice.way,
            reason=choice.reason,
            microseconds=counted,
        )
        for dtype in dtypes
        for batch in batches
        for scale, blocks, (shape, choice, counted) in plan_ways(
            model.transformer.config,
            model.plans[model.plan_name],
            batch=batch,
            dtype=DTYPES[dtype],
            device=device.type,
            triton=triton,
        )
    ]
    return WaysReport(device=str(device), plan=model.plan_name, note=_note(model, device.type), rows=tuple(rows))


def render_ways(report: WaysReport) -> RenderableType:
    """The table of a report."""
    table = Table(title=f"expert FFNs on {report.device}, plan {report.plan}", box=box.SIMPLE)
    for name in ("dtype", "batch", "scale", "blocks", "rows", "prefix", "routed", "of", "way", "why"):
        table.add_column(name, justify="left" if name in ("dtype", "way", "why") else "right")
    for row in report.rows:
        routed = str(row.routed)
        figures = ", ".join(f"{way} {each:.0f} us" for way, each in row.microseconds.items())
        numbers = map(str, (row.batch, row.scale, row.blocks, row.rows, row.prefix))
        reason = f"{row.reason} ({figures})" if figures else row.reason
        table.add_row(row.dtype, *numbers, routed, str(row.free), row.way, reason)
    return Group(table, Text(report.note, style="dim"))


def _note(model: SparseVARModel, device: str) -> str:
    """What rows and microseconds mean for a model on a device."""
    rows = "one per image, guidance is folded in"
    if model.plan.rows == 2:
        rows = "two per image, with its class and without"
    machine = {"cpu": "two cores with AVX-512", "cuda": "a large GPU"}.get(device)
    counted = f" Microseconds: beyond the prefix, counted for {machine}, not measured." if machine else ""
    return f"Rows: {rows}.{counted}"
