"""The pyramids that recipes ask for: who samples them, in which dtype."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from actvar_convert import stores
from actvar_convert.models.alphabet import Bits, Codes
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
        stores.calibration_store(tiny_model, recipe(dtype), None, progress=SilentProgress()),
        stores.distillation_store(tiny_model, recipe(dtype), None, path=tmp_path / "tokens", progress=SilentProgress()),
    )
    for store, seed, count in zip(found, (1, 2), (6, 7), strict=True):
        assert len(store) == count
        first = sampling.generate_tokens(
            store.condition.rows(slice(3)), seed=seed + 7_919, chunk=3, sampling=sampling.sampling_with(cfg=2.0)
        )
        assert torch.equal(store.tokens[:3], first)
    assert tiny_model.dtype == torch.float32


def test_a_narrow_model_is_not_widened(tiny_model: Model) -> None:
    narrow = cast(tiny_model, torch.bfloat16)
    wide = stores.calibration_store(narrow, recipe("fp32"), None, progress=SilentProgress())
    assert torch.equal(
        wide.tokens, stores.calibration_store(narrow, recipe("bf16"), None, progress=SilentProgress()).tokens
    )


@pytest.mark.parametrize(("vocab", "size"), [(2, 1), (256, 1), (257, 2), (2**16, 2), (2**16 + 1, 3)])
def test_a_token_takes_the_bytes_that_it_needs(vocab: int, size: int) -> None:
    alphabet = Codes(vocab)
    tokens = torch.tensor([[0, vocab - 1, vocab // 2]])
    packed = alphabet.pack(tokens)
    assert packed.shape == (1, 3, size) and packed.dtype == torch.uint8
    assert torch.equal(alphabet.unpack(packed), tokens)


@pytest.mark.parametrize("bits", [1, 8, 9, 56])
def test_bits_take_an_eighth_of_a_byte(bits: int) -> None:
    alphabet = Bits(bits)
    tokens = torch.randint(0, 2, (3, 5, bits), generator=torch.Generator().manual_seed(bits))
    packed = alphabet.pack(tokens)
    assert packed.shape == (3, 5, -(-bits // 8)) and torch.equal(alphabet.unpack(packed), tokens)


def test_codes_beyond_two_bytes_are_stored_whole(tiny_model: Model, tmp_path: Path) -> None:
    vocab = 2**16 + 1
    config = tiny_model.config.model_copy(update={"vocab": vocab})
    tokenizer = tiny_model.tokenizer.config.model_copy(update={"vocab": vocab})
    torch.manual_seed(0)
    large = Model(VARTransformer(config), VQVAE(tokenizer)).eval().requires_grad_(False)
    large.transformer.head.bias[-1] = 20  # the code that two bytes do not hold
    sampled = stores.distillation_store(
        large, recipe("fp32"), None, path=tmp_path / "tokens", progress=SilentProgress()
    )
    first = large.generate_tokens(
        sampled.condition.rows(slice(3)), seed=2 + 7_919, chunk=3, sampling=large.sampling_with(cfg=2.0)
    )
    assert int(first.max()) == vocab - 1 and torch.equal(sampled.tokens[:3], first)
    again = stores.distillation_store(large, recipe("fp32"), None, path=tmp_path / "tokens", progress=SilentProgress())
    assert torch.equal(again.tokens, sampled.tokens)


def test_images_serve_calibration_and_training(tiny_model: Model, tmp_path: Path) -> None:
    for label in range(5):
        (tmp_path / str(label)).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (50 * label, 80 * i, 0)).save(tmp_path / str(label) / f"{i}.png")
    chosen = recipe("fp32")
    chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"images": str(tmp_path)})})
    images = stores.require_images(chosen, 5)
    assert images is not None and images.calibration.files[:6] != images.training.files[:6]
    calibration = stores.calibration_store(tiny_model, chosen, images, progress=SilentProgress())
    training = stores.distillation_store(tiny_model, chosen, images, path=None, progress=SilentProgress())
    for store, given, count in ((calibration, images.calibration, 6), (training, images.training, 7)):
        assert len(store) == len(given.files) == count and store.condition.values.tolist() == given.labels
        assert [int(path.parent.name) for path in given.files] == given.labels
