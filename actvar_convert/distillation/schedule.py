"""What a step does, from the seed and its own number alone: so a resumed run equals an uninterrupted one, and processes
that share a step agree without asking each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import torch

from actvar_convert.recipe.schema import StageRecipe


def learning_rate(recipe: StageRecipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def partly_dropped(condition: Any, share: float, seed: int) -> Any:
    """Conditions of which a random ``share`` says nothing."""
    return condition.dropped(torch.rand(len(condition), generator=torch.Generator().manual_seed(seed)) < share)


def plan_of_step(plans: Iterable[str], seed: int, step: int) -> str:
    """The plan that a step runs: every round of as many steps as there are plans runs each once, in random order."""
    order = sorted(plans)
    turn, place = divmod(step, len(order))
    random.Random(f"{seed}/plans/{turn}").shuffle(order)
    return order[place]
