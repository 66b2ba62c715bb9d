"""The pyramids that recipes ask for: who samples them, in which dtype."""

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
    calibration = CalibrationRecipe.model_validate({"pyramids": 6, "batch": 3})
    data = DataRecipe.model_validate({"pyramids": 7, "batch": 3, "cfg": 2.0})
    return Recipe.model_validate(
        {"name": "tiny", "model": "tiny", "dtype": dtype, "calibration": calibration, "data": data}
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_teacher_samples_in_the_dtype_of_the_recipe(tiny_model: Model, tmp_path: Path, dtype: str) -> None:
    sampling = cast(tiny_model, torch.bfloat16) if dtype == "bf16" else tiny_model
    found = (
        stores.calibration_store(tiny_model, recipe(dtype), progress=SilentProgress()),
        stores.distillation_store(tiny_model, recipe(dtype), path=tmp_path / "tokens", progress=SilentProgress()),
    )
    for store, seed, count in zip(found, (1, 2), (6, 7), strict=True):
        assert len(store) == count
        first = sampling.generate_tokens(store.labels[:3], seed=seed + 7_919, chunk=3, cfg=2.0)
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


def test_images_serve_calibration_and_training(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int, int]] = []

    def from_images(model: Model, folder: Path, count: int, *, seed: int, **more: object) -> None:
        asked.append((folder, count, seed))

    monkeypatch.setattr(stores, "store_from_images", from_images)
    chosen = recipe("fp32")
    chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"images": "there"})})
    stores.calibration_store(tiny_model, chosen, progress=SilentProgress())
    stores.distillation_store(tiny_model, chosen, path=None, progress=SilentProgress())
    assert asked == [(Path("there"), 6, 1), (Path("there"), 7, 2)]
