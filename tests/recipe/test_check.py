"""Settings that contradict each other or the model."""

from __future__ import annotations

import pytest

from actvar_convert.errors import RecipeError
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe import Recipe, check_recipe, load_recipe, problems_for

TINY = TransformerConfig(depth=2, width=64, heads=2, hidden=128, sides=(1, 2, 3, 4), vocab=32, z_channels=8, classes=5)
BASE = Recipe(name="r", model="m")


def recipe(**sections: dict[str, object]) -> Recipe:
    """A recipe with some settings changed, without the checks of ``load_recipe``."""
    return Recipe.model_validate({"name": "r", "model": "m", **sections})


def test_the_defaults_fit() -> None:
    assert problems_for(BASE) == [] == problems_for(BASE, TINY)
    check_recipe(BASE, TINY)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluate": {"seeds": [1, 0, 1]}}, "evaluate.seeds: given [1, 0, 1], allowed: every seed once"),
        ({"checks": {}}, "checks: no limit given"),
        ({"budget": {"plans": {"default": 0.1}}}, "budget.plans.default: that is the name of the plan that"),
        (
            {"distill": {"stage2": {"trainable": "none", "gate": "frozen"}}},
            "distill.stage2: trains nothing; set trainable or gate, or steps to 0",
        ),
        (
            {"budget": {"guidance": "folded"}, "distill": {"stage2": {"steps": 0}}},
            "budget.guidance: given folded, allowed: paired if distill.stage2 has 0 steps",
        ),
    ],
)
def test_contradictions_are_wrong_for_any_model(sections: dict[str, dict[str, object]], said: str) -> None:
    found = problems_for(recipe(**sections))
    assert len(found) == 1 and found[0].startswith(said)


def test_a_stage_that_is_left_out_contradicts_nothing() -> None:
    nothing = {"steps": 0, "trainable": "none", "gate": "frozen"}
    assert problems_for(recipe(distill={"stage2": nothing})) == []


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"experts": {"count": 24}}, "experts.count: given 24, allowed: a divisor of the 128 hidden neurons of an FFN"),
        ({"gate": {"rank": 65}}, "gate.rank: given 65, allowed: at most 64"),
        ({"budget": {"gate_scales": 5}}, "budget.gate_scales: given 5, allowed: 0 to 4"),
        ({"distill": {"stage2": {"trainable": "lora", "lora_rank": 65}}}, "distill.stage2.lora_rank: given 65"),
    ],
)
def test_what_does_not_fit_the_model(sections: dict[str, dict[str, object]], said: str) -> None:
    assert problems_for(recipe(**sections)) == []
    found = problems_for(recipe(**sections), TINY)
    assert len(found) == 1 and found[0].startswith(said)


def test_a_plan_for_another_depth_is_named_with_its_path() -> None:
    deeper = TINY.model_copy(update={"depth": 3})
    plans = {"fast": SparsityPlan.dense(deeper, experts=16), "good": SparsityPlan.dense(TINY, experts=16)}
    given = BASE.model_copy(update={"plans": plans})
    assert problems_for(given, TINY) == ["plans.fast.blocks: 3 blocks given, the model has 2"]
    differing = {**plans, "good": plans["good"].model_copy(update={"reconstruction_rank": 4})}
    found = problems_for(BASE.model_copy(update={"plans": differing}))
    assert found == [
        "plans: given {'fast': 16, 'good': 4} as reconstruction_rank, allowed: the same for all plans of a model"
    ]


def test_a_rank_beyond_the_width_is_refused_if_tokens_are_skipped() -> None:
    block = BlockPlan(prefix=(16,) * 4, routed=(0,) * 4, keep=(1.0, 1.0, 1.0, 0.5))
    gated = SparsityPlan(experts=16, blocks=(block,) * 2, reconstruction_rank=65)
    said = ["plans.a.reconstruction_rank: 65 exceeds the width of the model, 64"]
    for plan, expected in (
        (gated, said),
        (gated.model_copy(update={"reconstruction_rank": 64}), []),
        (SparsityPlan.dense(TINY, experts=16).model_copy(update={"reconstruction_rank": 65}), []),
    ):
        assert problems_for(BASE.model_copy(update={"plans": {"a": plan}}), TINY) == expected


def test_settings_that_plans_overrule_are_named() -> None:
    stated = {"reconstruction_rank": 8}
    plan = SparsityPlan.dense(TINY, experts=16).model_copy(update=stated)
    sections = {"gate": {"rank": 4}, "budget": {"guidance": "folded"}}
    assert problems_for(recipe(**sections), TINY) == []
    assert problems_for(recipe(**sections, plans={"a": plan.model_dump()}), TINY) == [
        "gate.rank: given 4, but the plans say 8, and they decide; leave it out",
        "budget.guidance: given folded, but the plans say paired, and they decide; leave it out",
    ]
    same = {"gate": {"rank": 8}}
    assert problems_for(recipe(**same, plans={"a": plan.model_dump()}), TINY) == []


def test_all_of_them_in_one_error() -> None:
    wrong = recipe(experts={"count": 24}, gate={"rank": 65}, checks={})
    with pytest.raises(RecipeError, match="cannot be carried out") as caught:
        check_recipe(wrong, TINY)
    assert len(caught.value.problems) == 3
    with pytest.raises(RecipeError) as caught:
        load_recipe(wrong, config=TINY)
    assert len(caught.value.problems) == 3
