"""What a step does follows from the seed and its number alone."""

from __future__ import annotations

import pytest

from actvar_convert.distillation.schedule import learning_rate, plan_of_step
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
