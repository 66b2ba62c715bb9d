"""Losses against values worked out by hand."""

import math

import pytest
import torch

from actvar_convert.distillation.losses import LEAST_SPREAD, kl_per_token, regression, relative_error, weighted_mean


def test_relative_error() -> None:
    teacher = torch.tensor([[3.0, 4.0]])
    assert relative_error(teacher, teacher) == 0
    assert relative_error(torch.zeros(1, 2), teacher) == 1
    assert relative_error(torch.tensor([[3.0, 5.0]]), teacher) == pytest.approx(1 / 25)
    tokens, zero = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    assert relative_error(zero, tokens, weight_L=torch.tensor([1.0, 1.0])) == pytest.approx(25 / 26)
    assert relative_error(zero, tokens, weight_L=torch.tensor([2.0, 50.0])) == pytest.approx(0.5)


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
    assert kl_per_token(teacher, student).item() == pytest.approx(expected, rel=1e-5)
    assert kl_per_token(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_kl_keeps_its_size_at_high_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 1, 8, generator=generator) * 0.01 for _ in range(2))
    cold, hot = kl_per_token(teacher, student, 1.0), kl_per_token(teacher, student, 4.0)
    torch.testing.assert_close(hot, cold, rtol=0.05, atol=0)


def test_weighted_mean() -> None:
    value = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert weighted_mean(value, None) == 4
    assert weighted_mean(value, torch.tensor([1.0, 0.0])) == 3
    assert weighted_mean(value, torch.tensor([0.0, 0.0])) == 0
