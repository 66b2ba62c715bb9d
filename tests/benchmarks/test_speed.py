"""The speed benchmarks on the tiny model: what a row says, what is compared with what, and that no row is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cpu
import gpu
import pytest
import sides
import torch
from plain import PlainGeneration
from sides import Goal, Results, Row, Timing

from actvar_convert.cost import macs as costs
from actvar_convert.files.layout import official_config
from actvar_convert.kernels.expert_ffn import expert_ffn_masked, selection_mask
from actvar_convert.kernels.expert_weights import ExpertWeights
from actvar_convert.models.base import inner
from actvar_convert.models.model import Model
from actvar_convert.models.split import ffn_of
from actvar_convert.models.var.tokenizer import FAST_DECODERS

CPU = torch.device("cpu")
ROW = Row("d16", "bf16", 64, "tokens", "balanced", 300.0, 100.0, 80.0, 1.4, 0.02, 2**30, 3)


def given(**changes: object) -> cpu.Given:
    asked = {"extents": ["tokens", "images"], "repeats": 1, "sparse": None, "out": None}
    return cpu.Given(**(asked | changes))


def test_the_sides_of_a_row_are_one_model(tiny_model: Model, tiny_sparse: Model) -> None:
    plain = PlainGeneration(tiny_model)
    assert sides.same_tokens(plain, tiny_model, 3) == 1
    row = sides.measure("tiny", "fp32", plain, tiny_model, tiny_sparse, 2, 2, plain_repeats=1, routing="random")
    assert min(row.plain_ms or 0, row.dense_ms, row.sparse_ms or 0) > 0
    assert row.promised == sides.promised(tiny_sparse, False)
    over_plain, speedup, realised = row.ratios.values()
    assert over_plain == pytest.approx((row.plain_ms or 0) / row.dense_ms)
    assert realised == pytest.approx((speedup or 0) / (row.promised or 1))
    tiny_model.transformer.head.weight.mul_(-1)
    changed = PlainGeneration(tiny_model)
    assert sides.same_tokens(changed, tiny_model, 3) == 1
    tiny_model.transformer.head.weight.mul_(-1)
    assert sides.same_tokens(changed, tiny_sparse, 3) < 1, "another model draws other tokens"


def test_a_side_runs_as_often_as_was_asked() -> None:
    runs = []
    named = {name: lambda name=name: runs.append(name) for name in ("plain", "dense")}
    timings, peak = sides.alternate(named, {"plain": 1, "dense": 3}, CPU)
    assert runs == ["plain", "dense"] * 2 + ["dense"] * 2
    assert timings["plain"].spread == 0 and timings["dense"].ms > 0 and peak > 0


def test_rows_say_whether_they_reach_their_goals() -> None:
    assert ROW.goal == "-" and ROW.judged([]).goal == "-"
    assert ROW.judged([Goal("realised", 0.85), Goal("dense/plain", 3.0)]).goal == "met"
    missed = ROW.judged([Goal("realised", 0.9), Goal("speed-up", 1.0), Goal("dense/plain", 3.5)])
    assert missed.goal == "missed: realised 0.9, dense/plain 3.5" and missed.cells[-1] == missed.goal
    alone = Row("d16", "bf16", 1, "tokens", "-", None, 100.0, None, None, 0.0, 0, 3)
    assert alone.judged([Goal("realised", 0.9), Goal("dense/plain", 3.0)]).goal == "-"
    assert cpu.goals("fashion", 4, False) == [Goal("realised", 0.70)] and not cpu.goals("fashion", 4, True)
    assert cpu.goals("d16", 1, False) == [Goal("realised", 0.75)]
    assert cpu.goals("d16", 1, True) == [Goal("dense/plain", 1.25)]
    assert [goal.measure for goal in gpu.goals(1)] == ["dense/plain", "speed-up"] and not gpu.goals(16)


def test_finished_rows_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    results = Results(CPU, out)

    def rows() -> object:
        yield ROW
        assert len(json.loads(out.read_text())["rows"]) == 1
        yield ROW
        raise RuntimeError

    with pytest.raises(RuntimeError):
        results.add(rows())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("| model | dtype |") and lines[2] == lines[3]
    written = json.loads(out.read_text())
    assert written["schema"] == "actvar.speed/1" and [row["dense_ms"] for row in written["rows"]] == [100.0, 100.0]


def test_cpu_rows(tiny_model: Model, tiny_sparse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = cpu.in_format(tiny_sparse, "bf16")
    dense = cpu.in_format(tiny_model, "bf16")
    fast = torch.bfloat16 in FAST_DECODERS["cpu"]
    assert dense.tokenizer.decoder_dtype == (torch.bfloat16 if fast else torch.float32)
    assert cpu.in_format(tiny_model, "fp32") is tiny_model
    plain = PlainGeneration(dense, tiny_model.tokenizer)
    rows = cpu.rows_of("d16", dense, sparse, plain, "bf16", 1, given())
    assert [(row.extent, row.goal == "-") for row in rows] == [("tokens", False), ("images", False)]
    assert [row.extent for row in cpu.rows_of("d16", dense, sparse, plain, "bf16", 2, given())] == ["tokens"]
    monkeypatch.setattr(cpu, "same_tokens", lambda *_: 0.9)
    with pytest.raises(AssertionError, match="different tokens"):
        cpu.rows_of("fashion", tiny_model, tiny_sparse, PlainGeneration(tiny_model), "fp32", 1, given())
    assert [cpu.repeats_of(*each) for each in (("d16", "fp32", 16, False), ("d16", "bf16", 16, False))] == [1, 3]


@pytest.fixture
def gpu_on_cpu(tiny_model: Model, tiny_sparse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's rows with a tiny model, nothing recorded."""
    monkeypatch.setattr(gpu, "random_dense", lambda *_, **__: tiny_model)
    monkeypatch.setattr(gpu, "plan_of", lambda *_, **__: tiny_sparse.plan)
    monkeypatch.setattr(gpu, "recorded", lambda *_: (Timing(2.0, 0.1), 7))


def test_gpu_rows_share_what_is_dense(gpu_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1, 9))
    monkeypatch.setattr(gpu, "timed", lambda run, *_: (run(), (Timing(float(next(times)), 0.0), 0))[1])
    deadline = gpu.Deadline(1)
    rows = list(gpu.rows_of("d30", CPU, gpu.Settings([1, 3], 1, [0.4, 0.5]), deadline))
    assert [(row.routing, row.batch) for row in rows[:6]] == [
        ("static 40 %", 1),
        ("static 40 %", 3),
        *((f"{routing} 40 %", batch) for batch in (1, 3) for routing in ("balanced", "skewed")),
    ]
    assert len(rows) == 12 and not deadline.left_out
    assert {(row.batch, row.plain_ms) for row in rows} == {(1, 1.0), (3, None)}, "plain alone is timed once, at batch 1"
    assert {row.peak_memory_bytes for row in rows} == {7} and rows[0].goal == "missed: dense/plain 3"


def test_gpu_rows_that_do_not_fit_are_named(gpu_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = gpu.Settings([1], 1, [0.4])
    ticks = iter((0.0, 1.0, 2.0, 59.0, 61.0, 62.0))
    late = gpu.Deadline(1, now=lambda: next(ticks))
    assert len(list(gpu.rows_of("d16", CPU, settings, late))) == 1
    assert late.left_out == ["d16 balanced 40 %, batch 1 (no time)", "d16 skewed 40 %, batch 1 (no time)"]

    def full(model: Model, *_: object) -> tuple[Timing, int]:
        if model.is_sparse:
            raise torch.OutOfMemoryError
        return Timing(2.0, 0.1), 7

    monkeypatch.setattr(gpu, "recorded", full)
    crowded = gpu.Deadline(1)
    assert not list(gpu.rows_of("d16", CPU, settings, crowded))
    assert len(crowded.left_out) == 3 and crowded.left_out[0] == "d16 static 40 %, batch 1 (out of memory)"


@pytest.mark.parametrize("reduction", [0.4, 0.5])
def test_gpu_plans_save_what_they_say_and_route(reduction: float) -> None:
    for name in ("d16", "d24", "d30"):
        config, _ = official_config(f"var-{name}")
        last = config.schedule.num_scales - 1
        for routed in (False, True):
            plan = gpu.plan_of(config, name, reduction, routed=routed)
            saved = 1 - costs.transformer_macs(config, plan) / costs.transformer_macs(config, None)
            assert reduction <= saved < reduction + 0.01
            assert [plan.routes(block, last) for block in range(config.depth)] == [routed] * config.depth


def test_routers_lean_in_place(tiny_sparse: Model) -> None:
    router = ffn_of(tiny_sparse.transformer.blocks[0]).router
    assert router is not None
    place = router.linear.bias.data_ptr()
    sides.lean(tiny_sparse, skewed=True)
    assert bool((router.linear.bias.diff() < 0).all()) and router.linear.bias.data_ptr() == place
    sides.lean(tiny_sparse, skewed=False)
    assert not router.linear.bias.any()


def test_a_random_sparse_model_holds_the_dense_weights(tiny_model: Model, tiny_sparse: Model) -> None:
    made = sides.random_sparse(tiny_model, tiny_sparse.plan)
    ours, theirs = (inner(model.transformer.blocks[0]).attn.mat_qkv.weight for model in (made, tiny_model))
    assert ours.data_ptr() == theirs.data_ptr() and not any(each.requires_grad for each in made.parameters())
    assert made.generate([0, 1]).isfinite().all()


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"needs a GPU: torch sees no CUDA device here. benchmarks/cpu.py measures"):
        gpu.main()


def test_a_dry_run_goes_through_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(out), "--models", "d16", "d24"])
    gpu.main()
    printed = capsys.readouterr().out
    assert "times mean nothing" in printed and "left out" not in printed
    for line in ("linear layer", "grouped_mm", "decoder in bf16", "torch.compile", "the plain path draws"):
        assert line in printed
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 3 and {row["model"] for row in rows} == {"d16 (tiny)", "d24 (tiny)"}


@torch.inference_mode()
def test_grouped_products_are_the_same_ffn() -> None:
    torch.manual_seed(0)
    weights = ExpertWeights(torch.randn(64, 16), torch.randn(64), torch.randn(16, 64), torch.randn(16), experts=8)
    x, chosen = torch.randn(30, 16), torch.rand(30, 5).topk(3).indices  # one expert is chosen by nobody
    want = expert_ffn_masked(x, weights, 2, selection_mask(chosen, 6))
    torch.testing.assert_close(gpu.grouped_ffn(x, weights, 2, chosen), want, rtol=1e-4, atol=1e-4)


def test_compiled_blocks_draw_the_same_tokens_and_are_undone(tiny_model: Model) -> None:
    want = tiny_model.generate_tokens([0, 1])
    with gpu.compiled_blocks(tiny_model):
        assert all(block._compiled_call_impl is not None for block in tiny_model.transformer.blocks)
        assert torch.equal(tiny_model.generate_tokens([0, 1]), want)
    assert all(block._compiled_call_impl is None for block in tiny_model.transformer.blocks)
