"""The fast expert FFN against the obvious one: odd sizes, empty experts, one row, all experts."""

import pytest
import torch

from actvar_convert.kernels.expert_ffn import ExpertWeights, expert_ffn_loop, expert_ffn_reference


def make_weights(width: int, experts: int, neurons: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(width * experts + neurons)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = experts * neurons
    return ExpertWeights(
        draw(hidden, width), draw(hidden), draw(width, hidden), draw(width), draw(experts, width)
    )


@pytest.mark.parametrize(
    ("rows", "width", "experts", "neurons", "prefix"),
    [(1, 3, 2, 1, 0), (7, 5, 4, 3, 1), (13, 8, 5, 7, 4), (6, 4, 3, 2, 3), (0, 4, 3, 2, 1), (9, 6, 1, 5, 0)],
)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_loop_equals_reference(
    rows: int, width: int, experts: int, neurons: int, prefix: int, density: float
) -> None:
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
            expected[row] += weights.w2[:, own] @ hidden if active[row, expert] else weights.inactive[expert]
    torch.testing.assert_close(expert_ffn_reference(x, weights, active), expected)


def test_gradients_of_the_reference() -> None:
    weights = ExpertWeights(*(tensor.requires_grad_() for tensor in make_weights(3, 2, 2)))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    active = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    assert torch.autograd.gradcheck(lambda x, *w: expert_ffn_reference(x, ExpertWeights(*w), active), (x, *weights))
