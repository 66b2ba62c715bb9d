"""The table of ways of a model's plan."""

import json

import pytest
import torch
from rich.console import Console

from actvar_convert.errors import InputError
from actvar_convert.measure.ways import plan_ways, render_ways, ways_report
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel


def test_scales_that_run_everything_are_left_out(tiny_sparse: SparseVARModel) -> None:
    config = tiny_sparse.transformer.config
    rows = plan_ways(config, tiny_sparse.plans["default"], batch=3, dtype=torch.bfloat16, device="cuda", triton=True)
    assert [(way.scale, way.blocks, way.row.shape.rows) for way in rows] == [(2, 2, 6 * 9), (3, 2, 6 * 8)]
    assert all(way.row.shape[-2:] == (2, 2) and way.row.choice.way == "masked" for way in rows)
    everything = tiny_sparse.plans["all"]
    assert not plan_ways(config, everything, batch=3, dtype=torch.bfloat16, device="cuda", triton=True)


def test_a_batch_without_images_is_refused(tiny_sparse: SparseVARModel) -> None:
    for batches in ([-4], [1, 0], []):
        with pytest.raises(InputError, match=r"batches: \[.*\] given, one or more numbers of at least 1 needed"):
            ways_report(tiny_sparse, batches, ["fp32"])


def test_the_table_names_way_and_reason(tiny_sparse: SparseVARModel, tiny_model: VARModel) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_ways(ways_report(tiny_sparse, [1, 4], ["fp32"])))
    text = capture.get()
    assert "plan default" in text and text.count("as fitted (masked") == 4 and "loop" in text
    assert "two per image" in text and "two cores" in text and "large GPU" not in text
    with pytest.raises(InputError, match="dense"):
        ways_report(tiny_model, [1], ["fp32"])
    with pytest.raises(InputError, match="int3"):
        ways_report(tiny_sparse, [1], ["int3"])


def test_the_report_tells_a_program_the_same(tiny_sparse: SparseVARModel) -> None:
    report = json.loads(ways_report(tiny_sparse, [4], ["bf16"]).to_json())
    assert (report["schema"], report["device"], report["plan"]) == ("actvar.ways/1", "cpu", "default")
    assert [(row["scale"], row["blocks"], row["rows"], row["batch"]) for row in report["rows"]] == [
        (2, 2, 8 * 9, 4),
        (3, 2, 8 * 8, 4),
    ]
    for row in report["rows"]:
        assert row["way"] == min(row["microseconds"], key=row["microseconds"].get) and row["reason"]


def test_a_static_plan_runs_one_product_over_a_view(tiny_folded: SparseVARModel) -> None:
    static = [block.model_copy(update={"routed": (0, 0, 0, 0)}) for block in tiny_folded.plan.blocks]
    plan = tiny_folded.plan.model_copy(update={"blocks": tuple(static)})
    rows = plan_ways(tiny_folded.transformer.config, plan, batch=3, dtype=torch.float32, device="cpu", triton=False)
    assert [(way.row.choice.way, way.row.shape.rows) for way in rows] == [("prefix", 3 * 9), ("prefix", 3 * 8)]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render_ways(ways_report(tiny_folded, [1], ["fp32"])))
    assert "one per image, guidance is folded in" in capture.get()
