"""The fused expert FFN against the obvious one, on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from actvar_convert.kernels.expert_ffn import (
    expert_ffn,
    expert_ffn_reference,
    expert_ffn_triton,
    pick_backend,
    selection_mask,
    triton_works,
)
from actvar_convert.kernels.expert_weights import ExpertWeights

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

from actvar_convert.kernels.expert_ffn_triton import tiling  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# the interpreter multiplies no bf16
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]

SHAPES = [
    # rows, width, experts, neurons, prefix, routed
    (1, 16, 4, 16, 0, 1),
    (7, 24, 5, 16, 2, 2),
    (40, 80, 6, 40, 1, 3),
    (33, 16, 4, 24, 3, 1),
    (19, 64, 5, 64, 2, 3),
    (6, 16, 4, 8, 0, 0),
    (0, 16, 4, 8, 1, 2),
    (20, 32, 24, 16, 4, 3),
    (18, 16, 40, 8, 1, 4),
]


def made(
    rows: int, width: int, experts: int, neurons: int, prefix: int, routed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ExpertWeights, torch.Tensor]:
    """Rows, weights of moderate size, and a choice with experts that nobody takes if there is room for them."""
    generator = torch.Generator().manual_seed(rows + width + experts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.3).to(DEVICE, dtype)

    hidden = experts * neurons
    weights = ExpertWeights(draw(hidden, width), draw(hidden), draw(width, hidden), draw(width), experts)
    score = torch.randn(rows, experts - prefix, generator=generator)
    score[:, 1:2] -= 100.0
    return draw(rows, width), weights, score.topk(routed, dim=-1, sorted=False).indices.to(DEVICE)


def reference(x: torch.Tensor, weights: ExpertWeights, prefix: int, chosen: torch.Tensor) -> torch.Tensor:
    routed = selection_mask(chosen, weights.experts - prefix)
    active = torch.cat((routed.new_ones(len(x), prefix), routed), dim=1)
    return expert_ffn_reference(x.double(), weights.to(torch.float64), active)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = {torch.float32: (1e-4, 1e-5), torch.float16: (0.01, 0.02), torch.bfloat16: (0.05, 0.1)}[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_triton_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weights, chosen = made(*shape, dtype)
    got = expert_ffn_triton(x, weights, shape[4], chosen)
    assert got.dtype == dtype and got.shape == x.shape
    close(got, reference(x, weights, shape[4], chosen))


@torch.no_grad()
def test_rows_and_weights_that_are_not_contiguous() -> None:
    x, weights, chosen = made(21, 32, 4, 16, 1, 2, torch.float16)
    want = reference(x, weights, 1, chosen)
    slanted = weights._replace(w1=weights.w1.T.contiguous().T, w2=weights.w2.T.contiguous().T)
    close(expert_ffn_triton(x.T.contiguous().T, slanted, 1, chosen.T.contiguous().T), want)
    wide = torch.cat((x, x), dim=1)[:, :32]
    close(expert_ffn_triton(wide, weights, 1, chosen), want)


@torch.no_grad()
def test_all_rows_share_one_choice() -> None:
    x, weights, _ = made(35, 32, 6, 16, 2, 2, torch.float16)
    chosen = torch.tensor([[3, 1]], device=DEVICE).expand(35, -1)
    close(expert_ffn_triton(x, weights, 2, chosen), reference(x, weights, 2, chosen))


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, weights, chosen = made(30, 32, 8, 16, 0, 3, torch.float32)
    whole = expert_ffn_triton(x, weights, 0, chosen)
    assert torch.equal(whole, expert_ffn_triton(x, weights, 0, chosen))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(whole[order], expert_ffn_triton(x[order], weights, 0, chosen[order]))
    assert torch.equal(whole, expert_ffn_triton(x, weights, 0, chosen.flip(1)))


def test_tiles_fit_what_they_cover() -> None:
    assert tiling(32768, 1024, 256, 2) == (128, 256, 256, 64)
    assert tiling(32768, 1536, 384, 2) == (128, 128, 256, 64)
    assert tiling(512, 1024, 256, 2).rows == 16
    assert tiling(3, 24, 8, 4) == (16, 16, 32, 32)


def test_the_kernels_are_tried_once_before_they_are_used() -> None:
    assert triton_works(DEVICE)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@torch.inference_mode()
def test_large_shapes_take_it_and_wait_for_nothing() -> None:
    x, weights, chosen = made(16384, 1024, 8, 512, 2, 3, torch.bfloat16)
    assert triton_works(x.device) and pick_backend(x, weights, 2, 3) == "triton"
    expert_ffn(x, weights, 2, chosen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = expert_ffn(x, weights, 2, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = expert_ffn(x, weights, 2, chosen)
    graph.replay()
    assert torch.equal(captured, eager)
