"""What can be known to be wrong with a recipe before any work: settings that contradict each other or the model."""

from __future__ import annotations

from collections.abc import Iterator

from actvar_convert.errors import RecipeError
from actvar_convert.models.schedule import Config
from actvar_convert.recipe.schema import Recipe, StageRecipe


def problems_for(recipe: Recipe, config: Config | None = None) -> list[str]:
    """Everything that keeps a recipe from being carried out, each with its dotted path; empty when nothing does.

    Args:
        recipe: the recipe; its single values are within their ranges already.
        config: shape of the dense model; None: only what is wrong for any model.
    """
    found = [*_contradictions(recipe)]
    if config is not None:
        found += _misfits(recipe, config)
    return found


def check_recipe(recipe: Recipe, config: Config | None = None) -> None:
    """Raises RecipeError with all problems of ``problems_for`` at once."""
    problems = problems_for(recipe, config)
    if problems:
        raise RecipeError(f"recipe {recipe.name!r} cannot be carried out:", problems)


def split_problems(recipe: Recipe) -> list[str]:
    """Why a recipe's student cannot be split over processes: Muon needs whole matrices."""
    found, reason = [], "if the model is split over processes (--shard)"
    for name, stage in _stages(recipe):
        if stage.steps and stage.optimizer == "muon":
            found.append(f"{name}.optimizer: given muon, allowed: adamw {reason}")
    return found


def _stages(recipe: Recipe) -> Iterator[tuple[str, StageRecipe]]:
    yield "distill.stage1", recipe.distill.stage1
    yield "distill.stage2", recipe.distill.stage2


def _contradictions(recipe: Recipe) -> Iterator[str]:
    further = recipe.budget.plans or {}
    if "default" in further and (recipe.default_plan is None or recipe.default_plan in further):
        yield "budget.plans.default: that is the name of the plan that budget.reduction makes; give this one another"
    if len(set(recipe.evaluate.seeds)) < len(recipe.evaluate.seeds):
        yield f"evaluate.seeds: given {list(recipe.evaluate.seeds)}, allowed: every seed once"
    for name, plan in (recipe.plans or {}).items():
        if plan.experts != recipe.experts.count:
            yield f"plans.{name}.experts: given {plan.experts}, allowed: experts.count, {recipe.experts.count}"
    for field in ("reconstruction_rank", "guidance"):
        values = {name: getattr(plan, field) for name, plan in (recipe.plans or {}).items()}
        if len(set(values.values())) > 1:
            yield f"plans: given {values} as {field}, allowed: the same for all plans of a model"
    yield from _beside_plans(recipe)
    joint = recipe.distill.stage2
    folded = [name for name, plan in (recipe.plans or {}).items() if plan.guidance == "folded"]
    given = f"plans.{folded[0]}.guidance" if folded else "budget.guidance"
    searched = recipe.plans is None and recipe.budget.guidance == "folded"
    if (folded or searched) and not joint.steps:
        yield (
            f"{given}: given folded, allowed: paired if distill.stage2 has 0 steps; it is what teaches a model to "
            "guide itself"
        )
    if recipe.plans is not None and recipe.default_plan is not None and recipe.default_plan not in recipe.plans:
        yield f"default_plan: given {recipe.default_plan!r}, allowed: one of {', '.join(recipe.plans)}"
    if joint.steps and joint.trainable == "none" and joint.gate == "frozen":
        yield "distill.stage2: trains nothing; set trainable or gate, or steps to 0"
    if recipe.checks is not None and not any(value is not None for value in recipe.checks.model_dump().values()):
        yield f"checks: no limit given; give at least one of {', '.join(type(recipe.checks).model_fields)}"


def _beside_plans(recipe: Recipe) -> Iterator[str]:
    """Settings that were given beside plans, which state them too, and that no plan has."""
    stated = (
        ("gate", "rank", "reconstruction_rank"),
        ("budget", "guidance", "guidance"),
    )
    for section, name, of_plan in stated:
        own = getattr(recipe, section)
        given, values = getattr(own, name), [getattr(plan, of_plan) for plan in (recipe.plans or {}).values()]
        if values and given not in values and given != type(own).model_fields[name].default:
            listed = ", ".join(dict.fromkeys(map(str, values)))
            yield f"{section}.{name}: given {given}, but the plans say {listed}, and they decide; leave it out"


def _misfits(recipe: Recipe, config: Config) -> Iterator[str]:
    scales, experts, budget = config.schedule.num_scales, recipe.experts, recipe.budget
    if config.hidden % experts.count:
        divisors = [n for n in range(1, config.hidden + 1) if config.hidden % n == 0]
        near = min(divisors, key=lambda n: (abs(n - experts.count), n))
        yield (
            f"experts.count: given {experts.count}, allowed: a divisor of the {config.hidden} hidden neurons of "
            f"an FFN, such as {near}"
        )
    if recipe.gate.rank > config.width:
        yield f"gate.rank: given {recipe.gate.rank}, allowed: at most {config.width}, the width of the model"
    if recipe.plans is None and budget.gate_scales > scales:
        yield f"budget.gate_scales: given {budget.gate_scales}, allowed: 0 to {scales}, the scales of the model"
    for name, plan in (recipe.plans or {}).items():
        yield from (problem.replace("plan.", f"plans.{name}.", 1) for problem in plan.problems(config))
    joint = recipe.distill.stage2
    if joint.trainable == "lora" and joint.lora_rank > config.width:
        given = f"distill.stage2.lora_rank: given {joint.lora_rank}"
        yield f"{given}, allowed: at most {config.width}, the width of the model"
