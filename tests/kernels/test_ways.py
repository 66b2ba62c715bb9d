"""The table of ways: which one is taken where, for devices that need not be there."""

import math

import pytest
import torch

from actvar_convert.kernels.ways import (
    FFNShape,
    choose,
    cpu_seconds,
    expected_union,
    ffn_seconds,
    gpu_seconds,
    product_flops,
    way_table,
)


def shape(rows: int, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, routed: int = 3) -> FFNShape:
    return FFNShape(device, dtype, rows, width=1024, neurons=512, experts=8, prefix=2, routed=routed)


def test_a_gpu_computes_all_experts_for_few_rows_and_shares_tiles_for_many() -> None:
    assert choose(shape(64), triton=True).way == "masked"
    assert choose(shape(32768), triton=True).way == "triton"
    assert choose(shape(32768, dtype=torch.float16), triton=True).way == "triton"


def test_without_the_kernels_copying_is_what_is_left_to_weigh() -> None:
    assert "triton" in gpu_seconds(shape(32768))
    assert choose(shape(32768), triton=False).way in ("grouped", "masked")
    assert choose(shape(32768, dtype=torch.float16), triton=False).way == "masked"
    large = FFNShape("cuda", torch.bfloat16, 32768, width=2048, neurons=2048, experts=16, prefix=0, routed=2)
    assert choose(large, triton=False).way == "grouped"
    assert choose(large, observer="compiler", triton=True).way == "grouped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2000, 100000])
@pytest.mark.parametrize("triton", [False, True])
def test_no_fixed_choice_waits_on_a_gpu(dtype: torch.dtype, rows: int, triton: bool) -> None:
    for routed in (1, 6):
        assert choose(shape(rows, dtype=dtype, routed=routed), triton=triton).way in ("masked", "grouped", "triton")
    assert choose(shape(rows, dtype=dtype, routed=0), triton=triton).way == "prefix"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_where_nothing_is_routed_there_is_nothing_to_choose(device: str) -> None:
    static = shape(64, device=device, routed=0)
    for observer in ("nobody", "counter", "compiler"):
        assert choose(static, observer=observer).way == "prefix"
    assert choose(static, gradients=True).way == "reference"
    assert not way_table([static], triton=False)[0].microseconds


def test_gradients_and_counters() -> None:
    assert choose(shape(32768), gradients=True, triton=True).way == "reference"
    assert choose(shape(32768), observer="counter", triton=True).way == "loop"
    assert choose(shape(32768, device="mps"), triton=True).way == "loop"


def test_more_experts_than_bits_are_not_for_the_kernels() -> None:
    many = FFNShape("cuda", torch.bfloat16, 32768, width=1024, neurons=64, experts=128, prefix=0, routed=8)
    assert "triton" not in gpu_seconds(many)


def test_the_expected_union_is_near_what_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    for free, routed in ((6, 3), (12, 4), (11, 5), (17, 7)):
        chosen = torch.rand(16384, free, generator=generator).topk(routed).indices
        key = torch.ones_like(chosen).bitwise_left_shift(chosen).sum(1).sort().values
        tiles = ((key.unsqueeze(1) >> torch.arange(free)) & 1).view(-1, 128, free)
        drawn = float(tiles.amax(1).sum(1).double().mean())
        assert math.isclose(expected_union(16384, free, routed), drawn, rel_tol=0.15)
    assert expected_union(100, 6, 6) == 6 and expected_union(100, 6, 0) == 0 and expected_union(1, 6, 3) == 6


def small(rows: int, dtype: torch.dtype = torch.float32, routed: int = 5) -> FFNShape:
    return FFNShape("cpu", dtype, rows, width=256, neurons=64, experts=16, prefix=4, routed=routed)


def test_the_cpu_costs_follow_what_was_measured() -> None:
    """Microseconds of docs/experiments.md, the prefix taken off: 5 of 12 experts of 64 neurons, 512 and 2048 rows."""
    for rows, dtype, masked, loop in (
        (512, torch.float32, 2801 - 760, 2969 - 760),
        (2048, torch.float32, 12279 - 2840, 9062 - 2840),
        (2048, torch.bfloat16, 6521 - 1494, 5573 - 1494),
    ):
        counted = cpu_seconds(small(rows, dtype))
        assert math.isclose(1e6 * counted["masked"], masked, rel_tol=0.15)
        assert math.isclose(1e6 * counted["loop"], loop, rel_tol=0.15)
    assert choose(small(128)).way == "masked" and choose(small(2048)).way == "loop"


def test_the_time_of_an_ffn_is_that_of_its_prefix_and_the_best_way() -> None:
    assert ffn_seconds(small(512, routed=0)) == 4 * 4 * 512 * 256 * 64 / product_flops("cpu", torch.float32)
    assert ffn_seconds(small(512)) == ffn_seconds(small(512, routed=0)) + min(cpu_seconds(small(512)).values())
    whole = shape(32768)
    assert ffn_seconds(whole, triton=True) < ffn_seconds(whole)


def test_the_table_has_a_reason_for_every_line() -> None:
    rows = way_table([shape(32768), shape(64), shape(512, device="cpu")], triton=True)
    assert [row.choice.way for row in rows] == ["triton", "masked", "loop"]
    assert all(row.choice.reason for row in rows)
    best = min(rows[0].microseconds, key=lambda way: rows[0].microseconds[way])
    assert best == "triton"
    counted = cpu_seconds(shape(512, device="cpu"))
    assert rows[2].microseconds == {way: 1e6 * seconds for way, seconds in counted.items()}
