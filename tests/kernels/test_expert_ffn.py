"""The fast expert FFN against the obvious one: odd sizes, empty experts, one row, all experts."""

import copy

import pytest
import torch

from actvar_convert.kernels.expert_ffn import (
    expert_ffn,
    expert_ffn_loop,
    expert_ffn_masked,
    expert_ffn_prefix,
    expert_ffn_reference,
    pick_backend,
    selection_mask,
)
from actvar_convert.kernels.expert_weights import DerivedWeights, ExpertWeights


def make_weights(width: int, experts: int, neurons: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(width * experts + neurons)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = experts * neurons
    return ExpertWeights(draw(hidden, width), draw(hidden), draw(width, hidden), draw(width), experts)


@pytest.mark.parametrize(
    ("rows", "width", "experts", "neurons", "prefix"),
    [(1, 3, 2, 1, 0), (7, 5, 4, 3, 1), (13, 8, 5, 7, 4), (6, 4, 3, 2, 3), (0, 4, 3, 2, 1), (9, 6, 1, 5, 0)],
)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_loop_equals_reference(rows: int, width: int, experts: int, neurons: int, prefix: int, density: float) -> None:
    weights = make_weights(width, experts, neurons)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    routed = torch.rand(rows, experts - prefix, generator=generator) < density
    active = torch.cat((torch.ones(rows, prefix, dtype=torch.bool), routed), dim=1)
    expected = expert_ffn_reference(x, weights, active)
    torch.testing.assert_close(expert_ffn_loop(x, weights, prefix, routed), expected, rtol=1e-10, atol=1e-10)


def test_loop_accepts_rows_that_are_not_contiguous() -> None:
    weights = make_weights(6, 4, 2)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).T
    routed = torch.rand(10, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    active = torch.cat((torch.ones(10, 1, dtype=torch.bool), routed), dim=1)
    expected = expert_ffn_reference(x.contiguous(), weights, active)
    torch.testing.assert_close(expert_ffn_loop(x, weights, 1, routed), expected, rtol=1e-10, atol=1e-10)


def test_reference_is_the_sum_over_experts() -> None:
    weights = make_weights(5, 3, 4)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    active = torch.rand(8, 3, generator=torch.Generator().manual_seed(4)) < 0.5
    expected = weights.b2.expand(8, -1).clone()
    for row in range(8):
        for expert in range(3):
            own = slice(expert * 4, expert * 4 + 4)
            hidden = torch.nn.functional.gelu(weights.w1[own] @ x[row] + weights.b1[own], approximate="tanh")
            expected[row] += active[row, expert] * (weights.w2[:, own] @ hidden)
    torch.testing.assert_close(expert_ffn_reference(x, weights, active), expected)


def test_gradients_of_the_reference() -> None:
    tensors = [tensor.requires_grad_() for tensor in make_weights(3, 2, 2)[:4]]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    active = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    assert torch.autograd.gradcheck(lambda x, *w: expert_ffn_reference(x, ExpertWeights(*w, 2), active), (x, *tensors))


SHAPES = [
    # rows, width, experts, neurons, prefix, routed
    (1, 8, 4, 8, 0, 1),
    (7, 24, 5, 16, 2, 2),
    (13, 16, 6, 8, 1, 5),
    (33, 16, 4, 24, 3, 1),
    (6, 16, 4, 8, 0, 0),
    (0, 16, 4, 8, 1, 2),
    (2, 16, 16, 8, 4, 1),
]


def scaled(weights: ExpertWeights, factor: float) -> ExpertWeights:
    return ExpertWeights(*(tensor.mul(factor) for tensor in weights[:4]), weights.experts)


def made(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ExpertWeights, torch.Tensor]:
    """Rows that are not contiguous, weights of moderate size, and a choice with experts that nobody takes."""
    rows, width, experts, neurons, prefix, routed = shape
    weights = scaled(make_weights(width, experts, neurons), 0.2).to(dtype)
    generator = torch.Generator().manual_seed(rows + routed)
    x = torch.randn(width, rows, generator=generator, dtype=torch.float64).T.to(dtype)
    score = torch.randn(rows, experts - prefix, generator=generator)
    score[:, :1] -= 100.0
    return x, weights, score.topk(routed, dim=-1, sorted=False).indices


def expected(x: torch.Tensor, weights: ExpertWeights, prefix: int, chosen: torch.Tensor) -> torch.Tensor:
    routed = selection_mask(chosen, weights.experts - prefix)
    active = torch.cat((routed.new_ones(len(x), prefix), routed), dim=1)
    return expert_ffn_reference(x.double(), weights.to(torch.float64), active)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("derived", [False, True])
def test_every_backend_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, derived: bool) -> None:
    x, weights, chosen = made(shape, dtype)
    prefix = shape[4]
    want = expected(x, weights, prefix, chosen)
    routed = selection_mask(chosen, weights.experts - prefix)
    if derived:
        weights = weights._replace(derived=DerivedWeights())
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    with torch.inference_mode():
        results = {
            "prefix": expert_ffn_prefix(x, weights, prefix) if shape[5] == 0 else want.to(dtype),
            "masked": expert_ffn_masked(x, weights, prefix, routed),
            "loop": expert_ffn_loop(x, weights, prefix, routed),
            "chosen by shape": expert_ffn(x, weights, prefix, chosen),
        }
        with torch.autocast("cpu", torch.bfloat16):
            mixed = expert_ffn(x, weights, prefix, chosen)
    for got in results.values():
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance)
    torch.testing.assert_close(mixed.double(), want, rtol=0.05, atol=0.1)


def test_the_choice_of_the_backend() -> None:
    weights = make_weights(256, 16, 64).to(torch.float32)
    few, many = torch.zeros(2, 256), torch.zeros(4096, 256)
    assert pick_backend(many, weights, 4, 5) == "reference", "gradients are wanted"
    with torch.no_grad():
        assert pick_backend(few, weights, 4, 5) == "masked"
        assert pick_backend(many, weights, 4, 5) == "loop"
        assert pick_backend(few.double(), weights, 4, 5) == "loop"


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 3, 4])
def test_the_prefix_alone(dtype: torch.dtype, prefix: int) -> None:
    with torch.inference_mode(False):
        x, weights, chosen = made((7, 24, 4, 16, prefix, 0), dtype)
    derived = DerivedWeights()
    got = [expert_ffn(x, weights._replace(derived=each), prefix, chosen) for each in (None, derived, derived)]
    for each in got:
        want = expected(x, weights, prefix, chosen)
        torch.testing.assert_close(each.double(), want, rtol=0.05, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(got[1], got[2])


def test_every_expert_reads_one_copy() -> None:
    with torch.no_grad():
        weights = make_weights(6, 4, 2)._replace(derived=DerivedWeights())
        weights = weights.to(torch.float32)._replace(derived=weights.derived)
    size = weights.neurons
    with torch.inference_mode():
        read = [weights.expert_columns(expert) for expert in range(weights.experts)]
    for expert, columns in enumerate(read):
        assert torch.equal(columns, weights.w2[:, expert * size : (expert + 1) * size])
        assert columns.t().is_contiguous()
    assert len({columns.untyped_storage().data_ptr() for columns in read}) == 1
    with torch.no_grad():
        assert weights.expert_columns(0).data_ptr() == weights.w2.data_ptr(), "training changes weights"


def test_what_is_derived_follows_its_weight() -> None:
    derived, weight = DerivedWeights(), torch.nn.Parameter(torch.arange(24.0).view(4, 6))

    def transposed() -> torch.Tensor:
        with torch.inference_mode():
            out = derived.transposed(weight)
        assert out is not None
        return out

    first = transposed()
    assert first is transposed() and torch.equal(first, weight.T)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(transposed(), weight.T)
    weight.data = weight.data + 1
    assert torch.equal(transposed(), weight.T)
    weight.data = weight.data.to(torch.bfloat16).float() + 1
    assert torch.equal(transposed(), weight.T)
    assert copy.deepcopy(derived)._kept is None
    with torch.inference_mode():
        assert derived.transposed(torch.zeros(4, 6)) is None
    with torch.no_grad():
        assert derived.transposed(weight) is None
