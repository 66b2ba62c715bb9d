"""Losses against values worked out by hand."""

import math
from functools import partial

import pytest
import torch

from actvar_convert.distillation.losses import (
    LEAST_SPREAD,
    Total,
    kl,
    regression,
    relative_error,
    weighted_mean,
)
from actvar_convert.models.alphabet import Codes


def test_relative_error() -> None:
    teacher = torch.tensor([[3.0, 4.0]])
    assert relative_error(teacher, teacher) == 0
    assert relative_error(torch.zeros(1, 2), teacher) == 1
    assert relative_error(torch.tensor([[3.0, 5.0]]), teacher) == pytest.approx(1 / 25)
    tokens, zero = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    assert relative_error(zero, tokens, torch.tensor([[1.0, 1.0]])) == pytest.approx(25 / 26)
    assert relative_error(zero, tokens, torch.tensor([[2.0, 50.0]])) == pytest.approx(0.5)


def test_regression_is_in_units_of_the_variance() -> None:
    target = torch.tensor([1.0, 3.0])
    assert regression(torch.tensor([2.0, 2.0]), target) == 1
    assert regression(target, target) == 0


def test_regression_on_targets_that_are_all_alike() -> None:
    target = torch.tensor([2.0, 2.0])
    assert regression(target, target) == 0
    assert regression(torch.tensor([2.0, 2.2]), target) == pytest.approx(0.04 / (LEAST_SPREAD * 8), rel=1e-4)
    assert regression(torch.tensor([1.0]), torch.tensor([0.0])).isfinite()


def test_kl_by_hand() -> None:
    teacher, student = torch.tensor([[[math.log(3.0), 0.0]]]), torch.tensor([[[0.0, 0.0]]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert Codes(2).divergence(teacher, student).item() == pytest.approx(expected, rel=1e-5)
    assert Codes(2).divergence(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_weighted_mean() -> None:
    value = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert weighted_mean(value) == 4
    assert weighted_mean(value, torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == 3
    assert weighted_mean(value, torch.tensor([[1.0, 0.0], [0.0, 3.0]])) == 5.5
    assert weighted_mean(value, torch.zeros(2, 2)) == 0


LOSSES = {
    "relative_error": (relative_error, (2, 3, 4)),
    "kl": (partial(kl, Codes(4)), (2, 3, 4)),
    "regression": (regression, (2, 3)),
    "regression of several": (regression, (2, 3, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_one_are_none_and_a_weight_of_two_counts_a_token_twice(name: str) -> None:
    loss, shape = LOSSES[name]
    torch.manual_seed(0)
    one, other = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(loss(one, other, torch.ones(2, 3)), loss(one, other))
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    row, place = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 2, 1])
    expected = loss(one[row, place].unsqueeze(0), other[row, place].unsqueeze(0))
    torch.testing.assert_close(loss(one, other, weights), expected)
    assert loss(one, other, torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_shares_of_two_processes_add_up(name: str, weighted: bool) -> None:
    """Each process divides by what all of them have: ``total`` stands in for the other half of the rows."""
    loss, shape = LOSSES[name]
    torch.manual_seed(0)
    one, other = torch.randn(shape), torch.randn(shape)
    weights = torch.rand(2, 3) if weighted else None
    halves: list[list[torch.Tensor]] = [[], []]

    def share(row: slice, total: Total) -> torch.Tensor:
        return loss(one[row], other[row], None if weights is None else weights[row], total)

    def answers(own: list[torch.Tensor], others: list[torch.Tensor]) -> Total:
        def total(value: torch.Tensor) -> torch.Tensor:
            own.append(value)
            return value + others[len(own) - 1] if len(others) >= len(own) else value

        return total

    rows = (slice(0, 1), slice(1, 2))
    for _ in range(2):  # a second sum of a regression depends on the first one of all
        before = [list(half) for half in halves]
        halves = [[], []]
        shares = [share(rows[i], answers(halves[i], before[1 - i])) for i in (0, 1)]
    shares = [share(rows[i], answers([], halves[1 - i])) for i in (0, 1)]
    torch.testing.assert_close(shares[0] + shares[1], loss(one, other, weights))
