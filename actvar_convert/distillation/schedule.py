"""What a step does, from the seed and its own number alone: so a resumed run equals an uninterrupted one, and processes
that share a step agree without asking each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import torch
from torch import Tensor

from actvar_convert.recipe.schema import StageRecipe


def learning_rate(recipe: StageRecipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero at the last step."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def straight_through(recipe: StageRecipe, step: int) -> float:
    """Strength of the straight-through gradient of gates: linear over the stage; 0 where gates do not train."""
    if recipe.gate != "train":
        return 0.0
    progress = min(1.0, step / max(1, recipe.steps - 1))
    return recipe.straight_through + (recipe.straight_through_end - recipe.straight_through) * progress


def drop_labels(labels_B: Tensor, null_class: int, share: float, seed: int) -> Tensor:
    """Labels with a random ``share`` replaced by the null class."""
    dropped = torch.rand(len(labels_B), generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(dropped, null_class, labels_B)


def plan_of_step(plans: Iterable[str], seed: int, step: int) -> str:
    """The plan that a step runs: every round of as many steps as there are plans runs each once, in random order."""
    order = sorted(plans)
    turn, place = divmod(step, len(order))
    random.Random(f"{seed}/plans/{turn}").shuffle(order)
    return order[place]


def sampled_scales(share: float, first: int, scales: int, seed: int, step: int) -> int:
    """How many scales the student draws itself at a step; 0: the step replays stored pyramids.

    Args:
        share: of the steps whose pyramids the student draws.
        first: the first scale that such a pyramid has to lead to.
        scales: of a whole pyramid; the tokens of the last one lead to nothing and are never drawn.
    """
    numbers = random.Random(f"{seed}/on_policy/{step}")
    if numbers.random() >= share:
        return 0
    return numbers.randint(min(max(1, first), scales - 1), scales - 1)


def noise_seed(seed: int, step: int) -> int:
    """Seed of the random numbers by which the student draws the pyramids of a step."""
    return random.Random(f"{seed}/noise/{step}").getrandbits(63)
