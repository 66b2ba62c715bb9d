"""What tells one run from another."""

from __future__ import annotations

import copy
from pathlib import Path

from PIL import Image

from actvar_convert.models.model import Model
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.origins import Run
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.stores import require_images


def test_a_run_is_one_of_a_tokenizer_and_a_sampling(tiny_model: Model) -> None:
    recipe = Recipe(name="tiny", model="tiny")
    drawing, mixed = copy.copy(tiny_model), copy.deepcopy(tiny_model)
    drawing.sampling = tiny_model.sampling._replace(top_k=5)
    mixed.tokenizer = VQVAE(tiny_model.tokenizer.config.model_copy(update={"residual_ratio": 0.1}))
    mixed.tokenizer.load_state_dict(tiny_model.tokenizer.state_dict())
    prints = [Run.of(model, recipe).key for model in (tiny_model, copy.deepcopy(tiny_model), drawing, mixed)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_what_only_trains_leaves_the_conversion_as_it_is(tiny_model: Model) -> None:
    recipe = Recipe(name="tiny", model="tiny")
    longer = load_recipe(recipe, ["distill.stage2.steps=7"])
    larger = load_recipe(recipe, ["experts.count=8"])
    measured = load_recipe(recipe, ["evaluate.held_out=9", "benchmark.batches=[2]"])
    first, more, other, same = (Run.of(tiny_model, each) for each in (recipe, longer, larger, measured))
    assert first.start == more.start and first.key != more.key
    assert other.start != first.start and other.key != first.key
    assert (same.start, same.key) == (first.start, first.key)


def test_a_run_is_one_of_the_content_of_its_images(tiny_model: Model, tmp_path: Path) -> None:
    paths = [tmp_path / f"class{label}" / f"{i}.png" for label in range(5) for i in range(3)]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    recipe = load_recipe(
        Recipe(name="tiny", model="tiny"), [f"data.images={tmp_path}", "calibration.pyramids=2", "data.pyramids=8"]
    )

    def now() -> Run:
        return Run.of(tiny_model, recipe, require_images(recipe, 5))

    first = now()
    assert first.images is not None
    calibrating, training = (set(each.files) for each in first.images)
    for path in paths:
        path.touch()
    assert now() == first, "touched, not changed"
    Image.new("RGB", (8, 8), (0, 99, 0)).save(min(training - calibrating))
    assert now().start == first.start and now().key != first.key, "what is calibrated stays"
    Image.new("RGB", (8, 8), (0, 99, 0)).save(min(calibrating))
    assert now().start != first.start
