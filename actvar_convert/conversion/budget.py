"""From a FLOPs target to a SparsityPlan: what a recipe fixes, and the uniform plan, by which a search is estimated."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from math import gcd
from typing import Literal, NamedTuple

from actvar_convert.cost.macs import transformer_macs
from actvar_convert.errors import RecipeError
from actvar_convert.models.base import Config
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import Recipe

Gates = Literal["all", "inner", "none"]
"""Blocks that skip tokens at the scales that a recipe allows: "inner" is inner blocks at the last scale alone."""


class Choice(NamedTuple):
    """Active experts of one block at one scale: the first ``prefix``, and ``routed`` more by the router."""

    prefix: int
    routed: int


def may_skip(config: Config, recipe: Recipe, scale: int) -> bool:
    """Whether a recipe lets blocks skip tokens at a scale."""
    return recipe.budget.gate_keep < 1 and scale >= config.schedule.num_scales - recipe.budget.gate_scales


def assemble_plan(
    config: Config,
    recipe: Recipe,
    choice: Callable[[int, int], Choice],
    keep: Callable[[int, int], float],
) -> SparsityPlan:
    """The plan of a recipe with ``choice(block, scale)`` as active experts, ``keep(block, scale)`` as keep ratios."""
    scales = range(config.schedule.num_scales)
    blocks = []
    for block in range(config.depth):
        row = [choice(block, scale) for scale in scales]
        blocks.append(
            BlockPlan(
                prefix=tuple(each.prefix for each in row),
                routed=tuple(each.routed for each in row),
                keep=tuple(keep(block, scale) for scale in scales),
            )
        )
    return SparsityPlan(
        experts=recipe.experts.count,
        blocks=tuple(blocks),
        reconstruction_rank=recipe.gate.rank,
        guidance=recipe.budget.guidance,
    )


def make_plan(config: Config, recipe: Recipe, active: list[int], *, gates: Gates = "all") -> SparsityPlan:
    """The plan of a recipe in which block b runs ``active[b]`` experts per token at all scales.

    Of the scales that may skip tokens the blocks that ``gates`` names keep ``budget.gate_keep`` of them.
    """
    experts = recipe.experts.count

    def choice(block: int, scale: int) -> Choice:
        if active[block] == experts:
            return Choice(experts, 0)
        always = round(recipe.budget.prefix_share * active[block])
        return Choice(always, active[block] - always)

    def keep(block: int, scale: int) -> float:
        inner = scale == config.schedule.num_scales - 1 and 0 < block < config.depth - 1
        named = gates == "all" or (gates == "inner" and inner)
        return recipe.budget.gate_keep if named and may_skip(config, recipe, scale) else 1.0

    return assemble_plan(config, recipe, choice, keep)


def uniform_plan(config: Config, recipe: Recipe, target: float | None = None) -> SparsityPlan:
    """The plan with the most active experts that still saves the target share of the transformer's FLOPs.

    Every block runs the same number of experts, up to one: the last one to go leaves blocks spread over the depth.
    It stands for the plan that a search will find, whose gates are few: inner blocks skip tokens, at the last scale, as
    long as that reaches the target; none do if that saves more than is asked for and experts alone save enough.

    Args:
        target: share to save; by default the recipe's.

    Raises:
        RecipeError: no number of experts reaches the target.
    """
    target = recipe.budget.reduction if target is None else target
    experts, depth = recipe.experts.count, config.depth
    step = next(step for step in count(5, 2) if gcd(step, depth) == 1)
    spread = sorted(range(depth), key=lambda block: (block * step + 2) % depth)

    def saved(active: int, gates: Gates) -> float:
        return reduction(config, make_plan(config, recipe, [active] * depth, gates=gates))

    gates: Gates = "all"
    if saved(0, "inner") >= target:
        gates = "none" if saved(experts, "inner") > target and saved(0, "none") >= target else "inner"
    require_reach(recipe, target, saved(0, gates))
    low, high = 0, experts * depth
    while low < high:
        removed = (low + high) // 2
        active = _active(removed, experts, spread)
        if reduction(config, make_plan(config, recipe, active, gates=gates)) >= target:
            high = removed
        else:
            low = removed + 1
    return make_plan(config, recipe, _active(low, experts, spread), gates=gates)


def require_reach(recipe: Recipe, target: float, reached: float) -> None:
    """Raises RecipeError if removing every expert that may be inactive saves less than the target share."""
    if reached < target:
        where = "budget.reduction" if target == recipe.budget.reduction else "budget.plans"
        raise RecipeError(
            f"{where}: {target:.3f} is out of reach, {reached:.3f} is what removing every expert saves; lower the "
            "target, or gate more tokens (budget.gate_keep, gate_scales)"
        )


def targets(recipe: Recipe) -> tuple[dict[str, float], str]:
    """Share to save of every plan that a recipe's budget asks for, and the default plan's name."""
    further = recipe.budget.plans or {}
    name = recipe.default_plan if recipe.default_plan and recipe.default_plan not in further else "default"
    return {name: recipe.budget.reduction, **further}, recipe.default_plan or name


def recipe_plans(config: Config, recipe: Recipe) -> tuple[dict[str, SparsityPlan], str]:
    """The plans that a recipe asks for as far as shapes alone tell, and the default's name.

    Those that it states, or uniform ones of its budget, which stand for the plans that a search will find.
    """
    if recipe.plans:
        return dict(recipe.plans), recipe.default_plan or next(iter(recipe.plans))
    wanted, default = targets(recipe)
    return {name: uniform_plan(config, recipe, share) for name, share in wanted.items()}, default


def reduction(config: Config, plan: SparsityPlan) -> float:
    """Share of the transformer's FLOPs, with guidance, that a plan saves."""
    return 1 - transformer_macs(config, plan) / transformer_macs(config, None)


def _active(removed: int, experts: int, order: list[int]) -> list[int]:
    whole, extra = divmod(removed, len(order))
    cut = set(order[:extra])
    return [experts - whole - (block in cut) for block in range(len(order))]
