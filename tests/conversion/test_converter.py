"""The whole conversion of a tiny model, and the budget that makes its plan."""

import pytest
import torch

from actvar_convert.conversion.budget import reduction, uniform_plan
from actvar_convert.errors import RecipeError
from actvar_convert.models.model import Model
from actvar_convert.models.split import gated_blocks
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import BudgetRecipe, CalibrationRecipe, ExpertsRecipe, GateRecipe, Recipe

from ..conftest import convert_with, gated_plan


def recipe(**changes: object) -> Recipe:
    settings: dict[str, object] = {
        "name": "tiny",
        "model": "tiny",
        "experts": ExpertsRecipe(count=8),
        "calibration": CalibrationRecipe(pyramids=24, batch=8),
        "budget": BudgetRecipe(reduction=0.25, gate_keep=0.6),
        "gate": GateRecipe(rank=4),
    }
    return Recipe(**(settings | changes))


@pytest.fixture
def calibration(tiny_model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(24) % 5
    return tiny_model.generate_tokens(labels, seed=1), labels


def test_conversion_with_everything_on_is_the_dense_model(
    tiny_model: Model, calibration: tuple[torch.Tensor, torch.Tensor]
) -> None:
    config = tiny_model.config
    chosen = recipe()
    plans = {"plan": gated_plan(uniform_plan(config, chosen)), "all": SparsityPlan.dense(config, 8)}
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    sparse = convert_with(tiny_model, plans, "plan", chosen, *calibration)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    tokens, labels = calibration
    inputs = tiny_model.teacher_forcing_input(tokens)
    with torch.no_grad():
        expected = tiny_model.transformer(labels, inputs)
        lossy = sparse.transformer(labels, inputs)
        sparse.use_plan("all")
        exact = sparse.transformer(labels, inputs)
    assert float((exact - expected).norm() / expected.norm()) <= 1e-5
    assert 1e-4 < float((lossy - expected).norm() / expected.norm()) < 1
    images = sparse.generate([0, 1, 2], seed=4)
    torch.testing.assert_close(images, tiny_model.generate([0, 1, 2], seed=4), atol=1e-3, rtol=0)


def test_conversion_is_repeatable(tiny_model: Model, calibration: tuple[torch.Tensor, torch.Tensor]) -> None:
    chosen = recipe()
    plans = {"plan": gated_plan(uniform_plan(tiny_model.config, chosen))}
    first = convert_with(tiny_model, plans, "plan", chosen, *calibration).state_dict()
    second = convert_with(tiny_model, plans, "plan", chosen, *calibration).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_result_has_memory_of_its_own(tiny_model: Model, calibration: tuple[torch.Tensor, torch.Tensor]) -> None:
    chosen = recipe()
    plans = {"plan": gated_plan(uniform_plan(tiny_model.config, chosen))}
    sparse = convert_with(tiny_model, plans, "plan", chosen, *calibration)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in tiny_model.transformer.state_dict().values()}
    for name, tensor in sparse.transformer.state_dict().items():
        assert not tensor.is_meta and tensor.untyped_storage().data_ptr() not in theirs, name
    assert sparse.tokenizer is tiny_model.tokenizer and not sparse.training
    assert not any(parameter.requires_grad for parameter in sparse.transformer.parameters())


@pytest.mark.parametrize("rank", [0, 4])
def test_the_size_of_calibration_batches_changes_nothing(
    tiny_model: Model, calibration: tuple[torch.Tensor, torch.Tensor], rank: int
) -> None:
    states = []
    for batch in (24, 7):
        chosen = recipe(
            calibration=CalibrationRecipe(pyramids=24, batch=batch),
            budget=BudgetRecipe(reduction=0.25, gate_keep=0.6, gate_scales=2),
            gate=GateRecipe(rank=rank),
        )
        plans = {"plan": gated_plan(uniform_plan(tiny_model.config, chosen), blocks=(0, 1), scales=(2, 3))}
        states.append(convert_with(tiny_model, plans, "plan", chosen, *calibration).transformer)
    whole, parts = (model.state_dict() for model in states)
    for name, tensor in whole.items():
        if ".reconstruction.up." in name or ".reconstruction.down." in name:
            continue  # determined up to the signs of their pairs; their product is compared below
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    if rank:
        for one, other in zip(*(gated_blocks(model) for model in states), strict=True):
            products = [block.reconstruction.up.weight @ block.reconstruction.down.weight for block in (one, other)]
            torch.testing.assert_close(products[1], products[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("target", [0.05, 0.2, 0.35])
def test_budget_is_met_and_not_overspent(tiny_model: Model, target: float) -> None:
    config = tiny_model.config
    chosen = recipe(budget=BudgetRecipe(reduction=target))
    plan = uniform_plan(config, chosen)
    assert not plan.problems(config)
    assert target <= reduction(config, plan) < target + 0.05


def test_a_target_out_of_reach_says_what_is_in_reach(tiny_model: Model) -> None:
    with pytest.raises(RecipeError, match=r"out of reach.*lower the target"):
        uniform_plan(tiny_model.config, recipe(budget=BudgetRecipe(reduction=0.9)))


def test_shipped_fashion_recipe_meets_the_published_cut() -> None:
    from actvar_convert.models.var.config import TransformerConfig

    config = TransformerConfig(
        depth=8, width=256, heads=4, hidden=1024, sides=(1, 2, 3, 4, 6, 8), vocab=512, z_channels=16, classes=10
    )
    chosen = load_recipe("fashion")
    assert reduction(config, uniform_plan(config, chosen)) >= 0.212
