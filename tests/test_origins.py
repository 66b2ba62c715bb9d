"""What tells one run from another."""

from __future__ import annotations

import copy

from actvar_convert.models.model import VARModel
from actvar_convert.models.vqvae import VQVAE
from actvar_convert.origins import run_fingerprint
from actvar_convert.recipe.schema import BenchmarkRecipe, BudgetRecipe, Recipe


def test_a_run_is_one_of_a_tokenizer_and_a_sampling(tiny_model: VARModel) -> None:
    recipe = Recipe(name="tiny", model="tiny")
    drawing, mixed = copy.copy(tiny_model), copy.deepcopy(tiny_model)
    drawing.sampling = tiny_model.sampling._replace(top_k=5)
    mixed.tokenizer = VQVAE(tiny_model.tokenizer.config.model_copy(update={"residual_ratio": 0.1}))
    mixed.tokenizer.load_state_dict(tiny_model.tokenizer.state_dict())
    prints = [run_fingerprint(model, recipe) for model in (tiny_model, copy.deepcopy(tiny_model), drawing, mixed)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_the_clock_that_prices_belongs_to_a_run(tiny_model: VARModel) -> None:
    def prints(**budget: str) -> list[str]:
        recipe = Recipe(name="tiny", model="tiny", budget=BudgetRecipe.model_validate(budget))
        half = recipe.model_copy(update={"benchmark": BenchmarkRecipe(dtypes=("bf16", "fp32"))})
        elsewhere = copy.deepcopy(tiny_model).to("meta")
        elsewhere.state_dict = tiny_model.state_dict  # type: ignore[method-assign]
        runs = ((tiny_model, recipe), (tiny_model, half), (elsewhere, recipe))
        return [run_fingerprint(*each) for each in runs]

    assert len(set(prints(price="clock"))) == 3
    assert len(set(prints(price="flops"))) == len(set(prints(price="clock", search="uniform"))) == 1
