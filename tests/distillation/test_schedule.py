"""What a step does is drawn from the seed and its number alone."""

from __future__ import annotations

import pytest

from actvar_convert.distillation.schedule import (
    learning_rate,
    noise_seed,
    plan_of_step,
    sampled_scales,
    straight_through,
)
from actvar_convert.recipe.schema import JointStage


def test_the_learning_rate_rises_and_falls() -> None:
    usual = JointStage(steps=100, warmup=20, learning_rate=1.0)
    assert [learning_rate(usual, step) for step in (0, 19, 20)] == pytest.approx([0.05, 1, 1])
    assert learning_rate(usual, 99) < 1e-3
    short = JointStage(steps=10, warmup=20, learning_rate=1.0)
    assert [learning_rate(short, step) for step in (0, 4, 9)] == pytest.approx([0.05, 0.25, 0.5])


def test_every_round_of_steps_runs_every_plan_once() -> None:
    plans = ["fast", "balanced", "best"]
    drawn = [plan_of_step(plans, 0, step) for step in range(300)]
    assert all(set(drawn[i : i + 3]) == set(plans) for i in range(0, 300, 3))
    assert {drawn[i] for i in range(0, 300, 3)} == set(plans)
    assert drawn == [plan_of_step(reversed(plans), 0, step) for step in range(300)]
    assert drawn != [plan_of_step(plans, 1, step) for step in range(300)]
    assert plan_of_step(["only"], 0, 7) == "only"


def test_the_share_of_sampled_steps_and_their_scales() -> None:
    drawn = [sampled_scales(0.3, 3, 6, 0, step) for step in range(2000)]
    assert sum(scales > 0 for scales in drawn) / 2000 == pytest.approx(0.3, abs=0.03)
    assert set(drawn) == {0, 3, 4, 5}
    assert not any(sampled_scales(0, 0, 6, 0, step) for step in range(100))
    assert {sampled_scales(1, 0, 4, 0, step) for step in range(100)} == {1, 2, 3}
    assert sampled_scales(1, 4, 4, 0, 0) == 3
    assert sampled_scales(1, 0, 1, 0, 0) == 0
    assert len({noise_seed(seed, step) for seed in range(3) for step in range(50)}) == 150


def test_straight_through_is_linear_over_the_stage() -> None:
    assert [straight_through(JointStage(), step) for step in (0, 200, 399)] == [1, 1, 1]
    annealed = JointStage(steps=5, straight_through=0.8, straight_through_end=0)
    assert [straight_through(annealed, step) for step in range(5)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    assert straight_through(JointStage(gate="frozen"), 0) == 0
    assert straight_through(JointStage(steps=1), 0) == 1
