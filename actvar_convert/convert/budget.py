"""From a FLOPs target to a SparsityPlan: the uniform plan, the baseline of every search."""

from __future__ import annotations

from actvar_convert.errors import RecipeError
from actvar_convert.models.config import TransformerConfig
from actvar_convert.models.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.report.flops import count_flops


def first_sparse_scale(config: TransformerConfig, given: int | None) -> int:
    """The recipe's first sparse scale, or the first of the last scales that hold three quarters of the tokens."""
    if given is not None:
        return given
    pyramid = config.pyramid
    held, scale = 0, pyramid.num_scales
    while held < 0.75 * pyramid.total:
        scale -= 1
        held += pyramid.lengths[scale]
    return scale


def gated_blocks(config: TransformerConfig, given: list[int] | tuple[int, ...] | None) -> set[int]:
    """The recipe's gated blocks, or all but the first and the last."""
    return set(range(1, config.depth - 1)) if given is None else set(given)


def make_plan(config: TransformerConfig, recipe: Recipe, active: list[int]) -> SparsityPlan:
    """The plan of a recipe in which block b runs ``active[b]`` experts per token at the sparse scales."""
    budget, pyramid = recipe.budget, config.pyramid
    experts = recipe.experts.count
    first = first_sparse_scale(config, budget.first_scale)
    gated = gated_blocks(config, budget.gate_blocks) if budget.gate_keep < 1 else set()
    blocks = []
    for block in range(config.depth):
        prefix, routed, keep = [], [], []
        for scale in range(pyramid.num_scales):
            sparse = scale >= first and active[block] < experts
            always = min(active[block], round(budget.prefix_share * active[block])) if sparse else experts
            prefix.append(always)
            routed.append(active[block] - always if sparse else 0)
            late = scale >= pyramid.num_scales - budget.gate_scales
            keep.append(budget.gate_keep if late and block in gated else 1.0)
        blocks.append(BlockPlan(prefix=tuple(prefix), routed=tuple(routed), keep=tuple(keep)))
    return SparsityPlan(
        experts=experts,
        blocks=tuple(blocks),
        neighbourhood=recipe.experts.neighbourhood,
        router_width=recipe.experts.router_width,
        reconstruction=recipe.gate.reconstruction,
        reconstruction_rank=recipe.gate.rank,
        skipped_kv=recipe.gate.skipped_kv,
    )


def uniform_plan(config: TransformerConfig, recipe: Recipe) -> SparsityPlan:
    """The plan with the most active experts that still saves the recipe's share of the transformer's FLOPs.

    Every block runs the same number of experts, up to one: the last one to go leaves blocks spread over the depth.

    Raises:
        RecipeError: no number of experts reaches the target.
    """
    experts, depth = recipe.experts.count, config.depth
    spread = sorted(range(depth), key=lambda block: ((block * 5 + 2) % depth if depth % 5 else block, block))
    low, high = 0, experts * depth
    while low < high:
        removed = (low + high) // 2
        if reduction(config, make_plan(config, recipe, _active(removed, experts, spread))) >= recipe.budget.reduction:
            high = removed
        else:
            low = removed + 1
    plan = make_plan(config, recipe, _active(low, experts, spread))
    reached = reduction(config, plan)
    if reached < recipe.budget.reduction:
        raise RecipeError(
            f"budget.reduction: {recipe.budget.reduction:.3f} is out of reach, {reached:.3f} is what removing every "
            "expert from the sparse scales saves; lower the target, start at an earlier scale (budget.first_scale) or "
            "gate more tokens (budget.gate_keep, gate_scales, gate_blocks)"
        )
    return plan


def recipe_plans(config: TransformerConfig, recipe: Recipe) -> tuple[dict[str, SparsityPlan], str]:
    """The plans that a recipe asks for, and the default's name: those it states, or the one its budget leads to."""
    if recipe.plans:
        return dict(recipe.plans), recipe.default_plan or next(iter(recipe.plans))
    name = recipe.default_plan or "default"
    return {name: uniform_plan(config, recipe)}, name


def reduction(config: TransformerConfig, plan: SparsityPlan) -> float:
    """Share of the transformer's FLOPs, with guidance, that a plan saves."""
    report = count_flops(config, None, {"plan": plan}, "plan")
    assert report.reduction is not None
    return report.reduction.transformer


def _active(removed: int, experts: int, order: list[int]) -> list[int]:
    whole, extra = divmod(removed, len(order))
    cut = set(order[:extra])
    return [experts - whole - (block in cut) for block in range(len(order))]
