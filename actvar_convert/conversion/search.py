"""The search for a plan: experts and tokens are left out where the model's predictions feel it least.

Every (block, scale) offers the same settings of active experts and keep ratio; each has a price in multiply-adds
and a damage in nats (``sensitivity``). Damages are taken to add up, so the best plan for a budget is found exactly on
the convex hull: one exchange rate between damage and price, and every cell takes the setting with the smallest sum. The
rate is bisected until the plan meets the target, and what the plan saves beyond it is given back. After the
sensitivity-guided search of SnapViT (arXiv 2510.17700), whose evolutionary part the additive damages make unnecessary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from actvar_convert.conversion.activations import Calibration, Wanted, record_blocks
from actvar_convert.conversion.budget import (
    Choice,
    assemble_plan,
    may_skip,
    recipe_plans,
    reduction,
    require_reach,
    targets,
)
from actvar_convert.conversion.clustering import Clustering
from actvar_convert.conversion.experts import Partition
from actvar_convert.conversion.fisher import BlockMetrics, Measuring, output_metrics
from actvar_convert.conversion.sensitivity import BlockSensitivity, expert_damage, gate_damage
from actvar_convert.cost.macs import block_macs
from actvar_convert.models.base import Config
from actvar_convert.models.model import Model
from actvar_convert.plan import SparsityPlan, kept_tokens
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.device import autocast_dtype, trim_memory
from actvar_convert.system.processes import ALONE, Processes

TOKENS_PER_SCALE = 512
"""FFN inputs per scale and block on which experts are formed and choices are measured; all scales take part."""
BISECTIONS = 48


Picks = npt.NDArray[np.intp]
"""Number of the setting [blocks, scales] that every block takes at every scale."""


class Setting(NamedTuple):
    """What one block does at one scale: its active experts, and the share of the tokens that it computes."""

    choice: Choice
    keep: float


class Planned(NamedTuple):
    """What a conversion is to make.

    Attributes:
        plans: by name; default: the active one.
        partitions: of every block's neurons; None: the conversion makes them.
        damage: nats of KL per token that each plan is expected to cost untrained; empty without a search.
    """

    plans: dict[str, SparsityPlan]
    default: str
    partitions: list[Partition] | None
    damage: dict[str, float]


def plan_model(
    model: Model,
    recipe: Recipe,
    calibration: Calibration,
    *,
    metrics: Sequence[BlockMetrics] | None = None,
    on_step: Callable[[int], None] = lambda steps: None,
) -> Planned:
    """The plans of a recipe for a dense model: those it states, or the result of a search.

    Args:
        model: the dense model.
        recipe: with its budget.
        calibration: pyramids, of which the search looks at the first ``budget.pyramids``.
        metrics: what ``measure_metrics`` found for them; measured here if it is not given.
        on_step: told of steps done, ``search_steps`` in all, those of ``measure_metrics`` included.

    Raises:
        RecipeError: the budget is out of reach.
    """
    config = model.config
    if not searches(recipe):
        plans, default = recipe_plans(config, recipe)
        return Planned(plans, default, None, {})
    sensitivities = measure_sensitivity(model, recipe, calibration, metrics=metrics, on_step=on_step)
    wanted, default = targets(recipe)
    found = {name: search_plan(config, recipe, sensitivities, share) for name, share in wanted.items()}
    return Planned(
        {name: plan for name, (plan, _) in found.items()},
        default,
        [block.partition for block in sensitivities],
        {name: damage for name, (_, damage) in found.items()},
    )


def searches(recipe: Recipe) -> bool:
    """Whether a recipe's plans are found by a search on the model."""
    return not recipe.plans


def search_steps(config: Config, recipe: Recipe) -> int:
    """Steps that ``plan_model`` reports: pyramids, then blocks; 0 without a search."""
    return min(recipe.budget.pyramids, recipe.calibration.pyramids) + config.depth if searches(recipe) else 0


def measure_metrics(
    model: Model,
    recipe: Recipe,
    calibration: Calibration,
    *,
    state: Path | None = None,
    processes: Processes = ALONE,
    on_step: Callable[[int], None] = lambda steps: None,
) -> list[BlockMetrics]:
    """What errors in every block cost the predictions, on the pyramids that the search looks at; see ``Measuring``."""
    how = Measuring(recipe.seed, autocast_dtype(recipe.dtype), state, processes, on_step)
    metrics = output_metrics(model, calibration.first(recipe.budget.pyramids), how)
    trim_memory()
    return metrics


def measure_sensitivity(
    model: Model,
    recipe: Recipe,
    calibration: Calibration,
    *,
    metrics: Sequence[BlockMetrics] | None = None,
    clustering: Clustering | None = None,
    on_step: Callable[[int], None] = lambda steps: None,
) -> list[BlockSensitivity]:
    """Experts of every block, and the damage of every setting that a plan of the recipe may have.

    ``clustering`` groups neurons in place of the recipe's method; see ``plan_model`` for the other arguments.
    """
    if metrics is None:
        metrics = measure_metrics(model, recipe, calibration, on_step=on_step)
    config, schedule, levels = model.config, model.schedule, keep_levels(recipe)
    scales = range(schedule.num_scales)

    def gates(block: int) -> dict[int, list[float]]:
        return {s: levels for s in scales if may_skip(config, recipe, s)}

    def wanted(block: int) -> Wanted:
        return Wanted(frozenset(scales), 0 if gates(block) else None)

    found = []
    looked_at = calibration.first(recipe.budget.pyramids)
    for block, record in record_blocks(
        model, looked_at, wanted=wanted, tokens_per_scale=TOKENS_PER_SCALE, seed=recipe.seed
    ):
        own = metrics[record.index]
        partition, damage = expert_damage(block.ffn, record, own.ffn, recipe, schedule, clustering)
        skipping = gate_damage(block, record, own.block, recipe.gate.rank, keeps=gates(record.index), schedule=schedule)
        found.append(BlockSensitivity(partition, damage, skipping))
        del record
        trim_memory()
        on_step(1)
    return found


def keep_levels(recipe: Recipe) -> list[float]:
    """Keep ratios that a search tries: all tenths from the recipe's least share up."""
    least = recipe.budget.gate_keep
    return sorted({least, *(tenth / 10 for tenth in range(1, 11) if tenth / 10 >= least)}, reverse=True)


def search_plan(
    config: Config,
    recipe: Recipe,
    sensitivities: Sequence[BlockSensitivity],
    target: float,
) -> tuple[SparsityPlan, float]:
    """The plan of least summed damage that saves at least ``target`` of the transformer's FLOPs, and that damage.

    A setting's damage is that of its skipped tokens, and that of its inactive experts for the share of tokens that the
    block computes.

    Args:
        config: shape of the dense model.
        recipe: experts and gates.
        sensitivities: of every block, measured for this recipe.
        target: share of the transformer's FLOPs, with guidance.

    Returns:
        The plan, and its damage in nats per token.

    Raises:
        RecipeError: the target is out of reach.
    """
    settings = [Setting(c, keep) for keep in keep_levels(recipe) for c in _offered(sensitivities)]
    cost, price = _tables(config, recipe, sensitivities, settings)

    def plan_of(picks: Picks) -> SparsityPlan:
        return assemble_plan(
            config, recipe, lambda b, s: settings[picks[b, s]].choice, lambda b, s: settings[picks[b, s]].keep
        )

    def saves_enough(picks: Picks) -> bool:
        return reduction(config, plan_of(picks)) >= target

    possible = np.isfinite(cost)
    dearest = np.where(possible, cost, 0).max() + 1e-12
    cheapest = np.where(possible, price, np.inf).argmin(2)
    require_reach(recipe, target, reduction(config, plan_of(cheapest)))
    low, high = cost.argmin(2), cheapest
    below, above = 0.0, float(dearest / price[price > 0].min())
    for _ in range(BISECTIONS):
        rate = (below + above) / 2
        picks = (cost + rate * price).argmin(2)
        if saves_enough(picks):
            above, high = rate, picks
        else:
            below, low = rate, picks
    high = _give_back(low, high, cost, price, saves_enough)
    total = float(np.take_along_axis(cost, high[..., None], 2).sum())
    return plan_of(high), total / config.schedule.total


def _offered(sensitivities: Sequence[BlockSensitivity]) -> list[Choice]:
    """The choices of active experts, the same in every cell; all experts first, which wins if nothing differs."""
    tried = next(iter(sensitivities[0].damage.values()))
    return sorted(tried, key=lambda choice: -sum(choice))


def _tables(
    config: Config,
    recipe: Recipe,
    sensitivities: Sequence[BlockSensitivity],
    settings: Sequence[Setting],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Damage and price [blocks, scales, settings]; an impossible setting has infinite damage."""
    lengths = config.schedule.lengths
    cost = np.full((config.depth, len(lengths), len(settings)), np.inf)
    for block, own in enumerate(sensitivities):
        for scale, length in enumerate(lengths):
            damage = own.damage.get(scale, {Choice(recipe.experts.count, 0): 0.0})
            skipping = {1.0: 0.0, **own.skipping.get(scale, {})}
            for index, (choice, keep) in enumerate(settings):
                if choice in damage and keep in skipping:
                    share = kept_tokens(keep, length) / length
                    cost[block, scale, index] = skipping[keep] + share * damage[choice]
    scales = range(len(lengths))
    by_scale = [[setting_price(config, recipe, each, scale) for each in settings] for scale in scales]
    price = np.array(by_scale, np.float64)
    return cost, np.broadcast_to(price, cost.shape)


def setting_price(config: Config, recipe: Recipe, setting: Setting, scale: int) -> int:
    """Multiply-adds of one row in any block at one scale under a setting, the same at all scales."""
    plan = assemble_plan(config, recipe, lambda b, s: setting.choice, lambda b, s: setting.keep)
    return sum(block_macs(config, plan, 0, scale).values())


def _give_back(
    low: Picks,
    high: Picks,
    cost: npt.NDArray[np.float64],
    price: npt.NDArray[np.float64],
    saves_enough: Callable[[Picks], bool],
) -> Picks:
    """``high``, with better settings in the cells where ``low`` differs, as far as the target allows.

    A cell may take what ``low`` has there or anything in between, which no exchange rate picks: the setting that saves
    most damage for its price first.
    """
    picks = high.copy()
    between: list[tuple[float, float, tuple[int, ...], int]] = []
    for cell in map(tuple, np.argwhere(low != high)):
        costs_here, prices_here = cost[cell], price[cell]
        gain = costs_here[high[cell]] - costs_here
        extra = np.maximum(prices_here - prices_here[high[cell]], 1e-12)
        offered = np.flatnonzero((gain > 0) & (prices_here <= prices_here[low[cell]]))
        between += [(gain[each] / extra[each], gain[each], cell, int(each)) for each in offered]
    for _, _, cell, setting in sorted(between, key=lambda each: each[:2], reverse=True):
        if cost[cell][setting] < cost[cell][picks[cell]]:
            tried = picks.copy()
            tried[cell] = setting
            if saves_enough(tried):
                picks = tried
    return picks
