"""Token stores: order, resumption, images."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actvar_convert.distillation.data import Making, TokenStore, labelled_images, store_from_images, store_from_teacher
from actvar_convert.errors import InputError
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model
from actvar_convert.system.images import list_images, read_image
from actvar_convert.system.progress import SilentProgress


def test_an_epoch_visits_every_pyramid_once(tiny_model: Model) -> None:
    store = TokenStore(tiny_model, torch.arange(12).view(12, 1), torch.arange(12) % 5)
    seen = torch.cat([store.batch(step, 4, seed=1)[0][:, 0] for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))
    again = torch.cat([store.batch(step, 4, seed=1)[0][:, 0] for step in range(3)])
    assert torch.equal(seen, again)
    assert not torch.equal(seen, torch.cat([store.batch(step, 4, seed=1)[0][:, 0] for step in range(3, 6)]))


def test_sampling_goes_on_where_it_stopped(tiny_model: Model, tmp_path: Path) -> None:
    arguments = {"batch": 4, "seed": 3, "progress": SilentProgress()}
    whole = store_from_teacher(tiny_model, 10, Making(path=tmp_path / "whole.bin", **arguments))
    in_memory = store_from_teacher(tiny_model, 10, Making(path=None, **arguments))
    assert torch.equal(whole.tokens, in_memory.tokens)
    torn = tmp_path / "torn.bin"
    torn.write_bytes((tmp_path / "whole.bin").read_bytes()[: 5 * 30 + 7])
    resumed = store_from_teacher(tiny_model, 10, Making(path=torn, **arguments))
    assert torch.equal(resumed.tokens, whole.tokens)
    assert torn.read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert resumed.condition.values.tolist() == [i % 5 for i in range(10)]


def write_images(folder: Path, classes: int) -> None:
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(0, 255, (20, 9 + 3 * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")


def test_images_become_their_tokens(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    store = store_from_images(tiny_model, tmp_path, 8, Making(batch=3, seed=0, progress=SilentProgress()))
    assert store.tokens.shape == (8, 30) and set(store.condition.values.tolist()) <= set(range(5))
    assert int(store.tokens.long().max()) < 32


def test_images_that_changed_are_made_anew(tiny_model: Model, tmp_path: Path) -> None:
    folder, arguments = tmp_path / "images", {"batch": 3, "seed": 0, "progress": SilentProgress()}
    write_images(folder, 5)
    first = store_from_images(tiny_model, folder, 8, Making(path=tmp_path / "tokens.bin", **arguments))
    again = store_from_images(tiny_model, folder, 8, Making(path=tmp_path / "tokens.bin", **arguments))
    assert torch.equal(first.tokens, again.tokens) and len(list(tmp_path.glob("tokens-*.bin"))) == 1
    shutil.copy(folder / "class3" / "1.png", folder / "class0" / "00.png")
    more = store_from_images(tiny_model, folder, 8, Making(path=tmp_path / "tokens.bin", **arguments))
    whole = store_from_images(tiny_model, folder, 8, Making(path=None, **arguments))
    assert torch.equal(more.tokens, whole.tokens) and torch.equal(more.condition.values, whole.condition.values)


def test_images_are_tokenised_for_a_model_in_half_precision(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    arguments = {"path": None, "batch": 3, "seed": 0, "progress": SilentProgress()}
    whole = store_from_images(tiny_model, tmp_path, 8, Making(**arguments))
    half = store_from_images(cast(tiny_model, torch.bfloat16), tmp_path, 8, Making(**arguments))
    assert torch.equal(whole.tokens, half.tokens)


def test_another_number_of_classes_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    with pytest.raises(InputError, match="4 class folders, the model has 5"):
        store_from_images(tiny_model, tmp_path, 8, Making(batch=3, seed=0, progress=SilentProgress()))


def test_hidden_folders_are_no_classes_and_hold_no_images(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    seen, labels = labelled_images(tmp_path, 5)
    for place in (tmp_path, tmp_path / "class1"):
        (place / ".ipynb_checkpoints").mkdir()
        shutil.copy(tmp_path / "class0" / "0.png", place / ".ipynb_checkpoints" / "0-checkpoint.png")
    again, same = labelled_images(tmp_path, 5)
    assert seen == again and torch.equal(labels, same) and list_images(tmp_path) == seen


def test_an_image_beyond_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match=r"0\.png: cannot be read as an image \(Image size .*remove it or replace it"):
        read_image(tmp_path / "class0" / "0.png", 8)


def test_a_broken_image_is_named(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    (tmp_path / "class2" / "0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"0\.png: cannot be read"):
        store_from_images(tiny_model, tmp_path, 10, Making(batch=3, seed=0, progress=SilentProgress()))
