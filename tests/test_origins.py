"""What tells one run from another."""

from __future__ import annotations

import copy

from actvar_convert.models.model import Model
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.origins import run_fingerprint
from actvar_convert.recipe.schema import Recipe


def test_a_run_is_one_of_a_tokenizer_and_a_sampling(tiny_model: Model) -> None:
    recipe = Recipe(name="tiny", model="tiny")
    drawing, mixed = copy.copy(tiny_model), copy.deepcopy(tiny_model)
    drawing.sampling = tiny_model.sampling._replace(top_k=5)
    mixed.tokenizer = VQVAE(tiny_model.tokenizer.config.model_copy(update={"residual_ratio": 0.1}))
    mixed.tokenizer.load_state_dict(tiny_model.tokenizer.state_dict())
    prints = [run_fingerprint(model, recipe) for model in (tiny_model, copy.deepcopy(tiny_model), drawing, mixed)]
    assert prints[0] == prints[1] and len(set(prints)) == 3
