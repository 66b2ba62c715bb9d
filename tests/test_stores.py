"""The pyramids that recipes ask for: who draws them, in which number format."""

from pathlib import Path

import pytest
import torch

from actvar_convert import stores
from actvar_convert.errors import InputError
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.recipe.schema import CalibrationRecipe, DataRecipe, Recipe
from actvar_convert.system.progress import SilentProgress


def recipe(dtype: str) -> Recipe:
    calibration = CalibrationRecipe.model_validate({"pyramids": 6, "batch": 3, "dtype": dtype})
    data = DataRecipe.model_validate({"pyramids": 7, "batch": 3, "dtype": dtype, "cfg": 2.0})
    return Recipe(name="tiny", model="tiny", calibration=calibration, data=data)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_teacher_draws_in_the_format_of_the_recipe(tiny_model: Model, tmp_path: Path, dtype: str) -> None:
    drawing = cast(tiny_model, torch.bfloat16) if dtype == "bf16" else tiny_model
    found = (
        stores.calibration_store(tiny_model, recipe(dtype), progress=SilentProgress()),
        stores.distillation_store(tiny_model, recipe(dtype), path=tmp_path / "tokens", progress=SilentProgress()),
    )
    for store, seed, count in zip(found, (1, 2), (6, 7), strict=True):
        assert len(store) == count
        first = drawing.generate_tokens(store.labels[:3], seed=seed + 7_919, chunk=3, cfg=2.0)
        assert torch.equal(store.tokens[:3].long(), first)
    assert tiny_model.dtype == torch.float32


def test_a_narrow_model_is_not_widened(tiny_model: Model) -> None:
    narrow = cast(tiny_model, torch.bfloat16)
    wide = stores.calibration_store(narrow, recipe("fp32"), progress=SilentProgress())
    assert torch.equal(wide.tokens, stores.calibration_store(narrow, recipe("bf16"), progress=SilentProgress()).tokens)


def test_a_codebook_beyond_two_bytes_is_refused_first(tiny_model: Model, tmp_path: Path) -> None:
    vocab = 2**16 + 1
    config = tiny_model.config.model_copy(update={"vocab": vocab})
    tokenizer = tiny_model.tokenizer.config.model_copy(update={"vocab": vocab})
    large = Model(VARTransformer(config), VQVAE(tokenizer)).eval()
    with pytest.raises(InputError, match="65537 codes; token pyramids are stored with at most 65536"):
        stores.calibration_store(large, recipe("fp32"), progress=SilentProgress())
    with pytest.raises(InputError, match="at most 65536"):
        stores.distillation_store(large, recipe("fp32"), path=tmp_path / "tokens", progress=SilentProgress())
    assert not list(tmp_path.iterdir())
