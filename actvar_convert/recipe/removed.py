"""Settings that recipes had once: what replaced them, and how a recipe of format version 1 is read without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from actvar_convert.recipe.fields import ANY_INDEX, ANY_NAME, find
from actvar_convert.recipe.shape import Shape

ANYTHING: Final = object()
"""Stands for the kept value of a setting that changes nothing any more, whatever it says."""


def _hidden_weight(recipe: Mapping[str, Any]) -> float:
    """The weight of hidden states that a recipe of version 1 has to have."""
    budget = recipe.get("budget")
    return 0.0 if isinstance(budget, dict) and budget.get("guidance") == "folded" else 0.1


def _own_dtype(recipe: Mapping[str, Any]) -> object:
    """The dtype that all of a recipe has now."""
    return recipe.get("dtype", "fp32")


_ONE_DTYPE = "give dtype, which holds for sampling, training and evaluation"
_ONE_SOURCE = "give data.images, the folder, for calibration and training; without it the teacher samples"

REMOVED: dict[str, tuple[object, str]] = {
    "plans.NAME.blocks.N.mean_routed": (None, "a router picks the plan's number of experts for every token"),
    "plans.NAME.blocks.N.threshold": (None, "a router picks the plan's number of experts for every token"),
    "plans.NAME.neighbourhood": (1, "every token has experts of its own"),
    "plans.NAME.reconstruction": (
        "mixture",
        "skipped tokens are filled in by the scale before and a low-rank map",
    ),
    "plans.NAME.router_width": (0, "a router is one linear layer"),
    "plans.NAME.skipped_kv": ("dropped", "keys and values of skipped tokens are left out"),
    "gate.reconstruction": ("mixture", "skipped tokens are filled in by the scale before and a low-rank map"),
    "gate.skipped_kv": ("dropped", "keys and values of skipped tokens are left out"),
    "budget.first_scale": (None, "every scale may save"),
    "budget.gate_blocks": (None, "every block may skip tokens, at the last budget.gate_scales scales"),
    "budget.price": ("flops", "a search weighs damage against multiply-adds"),
    "budget.price_batch": (ANYTHING, "a search weighs damage against multiply-adds"),
    "budget.search": ("sensitivity", "a search finds the plans, or the recipe states them (plans)"),
    "experts.importance": ("gradient", "neurons are ranked by how much they move the predictions"),
    "experts.inactive": ("none", "inactive experts add nothing"),
    "experts.neighbourhood": (1, "every token has experts of its own"),
    "experts.projection": (64, "a random projection keeps 64 dimensions of an activation profile"),
    "experts.router_width": (0, "a router is one linear layer"),
    "experts.selection": ("fixed", "a router picks the plan's number of experts for every token"),
    "experts.shared": ("neurons", "the most important neurons, one by one, are what every token runs"),
    "heads": (ANYTHING, "give shape.heads"),
    "residual_ratio": (ANYTHING, "give shape.residual_ratio"),
    "sides": (ANYTHING, "give shape.sides"),
    "benchmark.repeats": (ANYTHING, "every row is timed five times"),
    "calibration.dtype": (ANYTHING, _ONE_DTYPE),
    "calibration.images": (ANYTHING, _ONE_SOURCE),
    "calibration.source": (ANYTHING, _ONE_SOURCE),
    "data.dtype": (_own_dtype, _ONE_DTYPE),
    "data.source": (ANYTHING, _ONE_SOURCE),
    "evaluate.dtype": (_own_dtype, _ONE_DTYPE),
    "evaluate.neighbours": (3, "precision and recall look at three neighbours"),
    "samples.per_class": (1, "the picture has one image of every class, with seed 0"),
    "samples.seed": (0, "the picture has one image of every class, with seed 0"),
    "distill.stage1.checkpoint_every": (ANYTHING, "state is saved by time"),
    "distill.stage1.ema": (None, "the weights of the last step are the result"),
    "distill.stage1.gate": ("frozen", "gates train in stage 2"),
    "distill.stage1.gate_loss": (0.0, "gates train in stage 2"),
    "distill.stage1.gradient_clip": (1.0, "gradients have at most norm 1"),
    "distill.stage1.hidden": (0.0, "stage 1 compares every FFN apart"),
    "distill.stage1.kl": (0.0, "stage 1 compares every FFN apart"),
    "distill.stage1.lora_rank": (ANYTHING, "low-rank additions train in stage 2"),
    "distill.stage1.on_policy": (0.0, "all pyramids are those of data"),
    "distill.stage1.output": (1.0, "the error of FFN outputs weighs 1"),
    "distill.stage1.plans": ("default", "give distill.plans, which holds for both stages"),
    "distill.stage1.router": ("regress", "stage 1 trains routers, stage 2 keeps them as they are"),
    "distill.stage1.router_loss": (1.0, "the regression of routers weighs 1"),
    "distill.stage1.scale_weights": (None, "tokens of all scales weigh the same"),
    "distill.stage1.straight_through": (1.0, "gates that train get the whole straight-through gradient"),
    "distill.stage1.straight_through_end": (1.0, "gates that train get the whole straight-through gradient"),
    "distill.stage1.temperature": (1.0, "the KL is that of the predictions as they are"),
    "distill.stage1.trainable": ("experts", "stage 1 trains routers and experts"),
    "distill.stage1.weight_decay": (0.0, "no weight decays"),
    "distill.stage2.checkpoint_every": (ANYTHING, "state is saved by time"),
    "distill.stage2.ema": (None, "the weights of the last step are the result"),
    "distill.stage2.gate_loss": (0.1, "the regression of gates weighs 0.1"),
    "distill.stage2.gradient_clip": (1.0, "gradients have at most norm 1"),
    "distill.stage2.hidden": (_hidden_weight, "the error of hidden states weighs 0.1, and 0 if guidance is folded"),
    "distill.stage2.kl": (1.0, "the KL weighs 1"),
    "distill.stage2.on_policy": (0.0, "all pyramids are those of data"),
    "distill.stage2.output": (0.0, "stage 2 compares the model as a whole"),
    "distill.stage2.plans": ("default", "give distill.plans, which holds for both stages"),
    "distill.stage2.router": ("frozen", "stage 1 trains routers, stage 2 keeps them as they are"),
    "distill.stage2.router_loss": (0.0, "routers train in stage 1"),
    "distill.stage2.scale_weights": (None, "tokens of all scales weigh the same"),
    "distill.stage2.straight_through": (1.0, "gates that train get the whole straight-through gradient"),
    "distill.stage2.straight_through_end": (1.0, "gates that train get the whole straight-through gradient"),
    "distill.stage2.temperature": (1.0, "the KL is that of the predictions as they are"),
    "distill.stage2.weight_decay": (0.0, "no weight decays"),
    "sparsify.batch": (ANYTHING, "neurons are clustered as the model has them"),
    "sparsify.checkpoint_every": (ANYTHING, "neurons are clustered as the model has them"),
    "sparsify.learning_rate": (ANYTHING, "neurons are clustered as the model has them"),
    "sparsify.optimizer": (ANYTHING, "neurons are clustered as the model has them"),
    "sparsify.steps": (0, "neurons are clustered as the model has them"),
    "sparsify.warmup": (ANYTHING, "neurons are clustered as the model has them"),
    "sparsify.weight": (ANYTHING, "neurons are clustered as the model has them"),
}
"""Dotted path of a setting: the value that became the rule, or a function that finds it for a recipe, and what replaced
the setting. ``NAME`` and ``N`` in a path stand for the name of a plan and for the number of a block."""

_OF_GATES = ("reconstruction", "skipped_kv")
"""Settings of a plan that say nothing if it skips no tokens."""


def replacement(path: Sequence[str | int]) -> str | None:
    """What replaced a setting, or a section, that recipes had once; None: they never had it."""
    for known, (_, text) in REMOVED.items():
        parts = known.split(".")
        if len(path) <= len(parts) and all(map(_meets, parts, path)):
            return text
    return None


def drop_removed(content: dict[str, Any], within: str = "") -> list[str]:
    """Takes the removed settings out of a recipe, or of another mapping with plans, of format version 1.

    Args:
        content: the mapping, which is changed.
        within: beginning of the dotted paths that are looked at.

    Returns:
        those that had another value than the kept one, a clause each.
    """
    for _, plan, _ in _places(content, ["plans", ANY_NAME, "experts"]):
        plan.setdefault("skipped_kv", "computed")
        if not _gated(plan):
            plan.update({key: REMOVED[f"plans.NAME.{key}"][0] for key in _OF_GATES})
    data = content.get("data")
    if isinstance(data, dict) and data.get("source") == "teacher":
        data["images"] = None
    shape = {} if within else {name: content[name] for name in Shape.model_fields if content.get(name) is not None}
    if shape:
        content["shape"] = shape
    problems = []
    for known, (kept, _) in REMOVED.items():
        expected = kept(content) if callable(kept) else kept
        for where, holder, key in _places(content, known.split(".") if known.startswith(within) else []):
            value = holder.pop(key)
            if value != expected and expected is not ANYTHING:
                problems.append(f"{where} is {value!r}, allowed: {expected!r}")
    for section in [key for key, value in content.items() if not value and find([key]) is None and replacement([key])]:
        del content[section]
    return sorted(problems)


def _meets(known: str, part: str | int) -> bool:
    return known in (ANY_NAME, str(part)) or (known == ANY_INDEX and str(part).isdecimal())


def _places(node: Any, path: Sequence[str], where: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every place of a mapping that a path leads to: dotted path, the mapping that holds it, its key there."""
    if not path:
        return
    entries: dict[Any, Any] = dict(enumerate(node)) if isinstance(node, list) else {}
    entries = node if isinstance(node, dict) else entries
    for key in [key for key in entries if _meets(path[0], key)]:
        if len(path) > 1:
            yield from _places(entries[key], path[1:], f"{where}{key}.")
        elif isinstance(node, dict):
            yield f"{where}{key}", node, key


def _gated(plan: Mapping[str, Any]) -> bool:
    """Whether a plan, as it is stored, skips tokens in any block."""
    blocks = plan["blocks"] if isinstance(plan.get("blocks"), list) else []
    keeps = [block.get("keep") for block in blocks if isinstance(block, dict)]
    return any(keep != [1.0] * len(keep) for keep in keeps if isinstance(keep, list))
