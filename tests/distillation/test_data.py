"""Token stores: order, resumption, images."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actvar_convert.distillation import data
from actvar_convert.distillation.data import (
    Making,
    TokenStore,
    chosen_images,
    labelled_images,
    store_from_images,
    store_from_teacher,
)
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
    torn, good = tmp_path / "whole.bin", (tmp_path / "whole.bin").read_bytes()
    torn.write_bytes(good[: len(good) // 2])
    resumed = store_from_teacher(tiny_model, 10, Making(path=torn, **arguments))
    assert torch.equal(resumed.tokens, whole.tokens)
    assert torn.read_bytes() == good
    assert resumed.condition.values.tolist() == [i % 5 for i in range(10)]


def tokens_of(model: Model, folder: Path, count: int, making: Making) -> TokenStore:
    """Pyramids of images that are chosen now."""
    (chosen,) = chosen_images(folder, 5, [(count, making.seed)], making.progress)
    return store_from_images(model, chosen, making)


def write_images(folder: Path, classes: int) -> None:
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(0, 255, (20, 9 + 3 * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")


def test_images_become_their_tokens(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    store = tokens_of(tiny_model, tmp_path, 8, Making(batch=3, seed=0, progress=SilentProgress()))
    assert store.tokens.shape == (8, 30) and set(store.condition.values.tolist()) <= set(range(5))
    assert int(store.tokens.long().max()) < 32


def test_images_that_changed_are_made_anew(tiny_model: Model, tmp_path: Path) -> None:
    folder, arguments = tmp_path / "images", {"batch": 3, "seed": 0, "progress": SilentProgress()}
    write_images(folder, 5)
    first = tokens_of(tiny_model, folder, 8, Making(path=tmp_path / "tokens.bin", **arguments))
    again = tokens_of(tiny_model, folder, 8, Making(path=tmp_path / "tokens.bin", **arguments))
    assert torch.equal(first.tokens, again.tokens) and len(list(tmp_path.glob("tokens-*.bin"))) == 1
    shutil.copy(folder / "class3" / "1.png", folder / "class0" / "00.png")
    more = tokens_of(tiny_model, folder, 8, Making(path=tmp_path / "tokens.bin", **arguments))
    whole = tokens_of(tiny_model, folder, 8, Making(path=None, **arguments))
    assert torch.equal(more.tokens, whole.tokens) and torch.equal(more.condition.values, whole.condition.values)


def test_images_are_tokenised_for_a_model_in_half_precision(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    arguments = {"path": None, "batch": 3, "seed": 0, "progress": SilentProgress()}
    whole = tokens_of(tiny_model, tmp_path, 8, Making(**arguments))
    half = tokens_of(cast(tiny_model, torch.bfloat16), tmp_path, 8, Making(**arguments))
    assert torch.equal(whole.tokens, half.tokens)


def test_another_number_of_classes_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    with pytest.raises(InputError, match="4 class folders, the model has 5"):
        tokens_of(tiny_model, tmp_path, 8, Making(batch=3, seed=0, progress=SilentProgress()))


def test_hidden_folders_are_no_classes_and_hold_no_images(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    seen, labels = labelled_images(tmp_path, 5)
    for place in (tmp_path, tmp_path / "class1"):
        (place / ".ipynb_checkpoints").mkdir()
        shutil.copy(tmp_path / "class0" / "0.png", place / ".ipynb_checkpoints" / "0-checkpoint.png")
    again, same = labelled_images(tmp_path, 5)
    assert seen == again and labels == same and list_images(tmp_path) == seen


def test_an_image_beyond_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match=r"0\.png: cannot be read as an image \(Image size .*remove it or replace it"):
        read_image(tmp_path / "class0" / "0.png", 8)


def test_every_broken_image_is_named_with_a_count_per_class(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    broken = [tmp_path / f"class{label}" / f"{i}.png" for label, i in ((2, 0), (4, 0), (4, 1))]
    for path in broken:
        path.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"3 of 10 images .*\(class2: 1 of 2, class4: 2 of 2\)") as caught:
        tokens_of(tiny_model, tmp_path, 2, Making(batch=3, seed=0, progress=SilentProgress()))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [str(path) for path in broken]


def test_of_a_large_tree_those_that_are_chosen_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 5)
    monkeypatch.setattr(data, "CHECKED", 9)
    (chosen,) = chosen_images(tmp_path, 5, [(3, 0)], SilentProgress())
    others = [path for path in list_images(tmp_path) if path not in chosen.files]
    lonely = next(path for path in others if path.with_name(f"{1 - int(path.stem)}.png") in chosen.files)
    lonely.write_bytes(b"not chosen, and the class has another one")
    assert chosen_images(tmp_path, 5, [(3, 0)], SilentProgress())[0].files == chosen.files
    chosen.files[1].write_bytes(b"chosen")
    pair = [path for path in others if path.with_name(f"{1 - int(path.stem)}.png") not in chosen.files]
    for path in pair:
        path.write_bytes(b"the whole class")
    with pytest.raises(InputError) as caught:
        chosen_images(tmp_path, 5, [(3, 0)], SilentProgress())
    named = {problem.split(": ")[0] for problem in caught.value.problems}
    assert {str(path) for path in (chosen.files[1], *pair)} <= named


def test_classes_without_an_image_are_named_with_what_they_hold(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    for label in (1, 3):
        for path in (tmp_path / f"class{label}").iterdir():
            path.rename(path.with_suffix(".tif")) if label == 3 else path.unlink()
    with pytest.raises(InputError, match=r"no image in 2 of 5 class folders; looked for \.png") as caught:
        labelled_images(tmp_path, 5)
    assert caught.value.problems == [f"{tmp_path}/class1: empty", f"{tmp_path}/class3: holds other files: 2 .tif"]


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    write_images(tmp_path / "elsewhere", 5)
    for label in range(5):
        (tmp_path / "tree" / f"class{label}").symlink_to(tmp_path / "elsewhere" / f"class{label}")
    files, labels = labelled_images(tmp_path / "tree", 5)
    assert len(files) == 10 and labels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    (tmp_path / "elsewhere" / "class3").rename(tmp_path / "away")
    with pytest.raises(InputError, match="4 class folders, the model has 5 classes; links that lead nowhere: class3"):
        labelled_images(tmp_path / "tree", 5)


def test_names_in_any_encoding_become_tokens(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 5)
    making = Making(batch=3, seed=0, progress=SilentProgress(), path=tmp_path / "tokens.bin")
    before = tokens_of(tiny_model, tmp_path / "images", 10, making)
    for path in list_images(tmp_path / "images"):
        path.rename(path.with_name(os.fsdecode(b"caf\xe9" + os.fsencode(path.name))))
    after = tokens_of(tiny_model, tmp_path / "images", 10, making)
    assert torch.equal(before.tokens, after.tokens)
    assert len(list(tmp_path.glob("tokens-*.bin"))) == 1, "the content is the same, whatever it is called"


def test_images_replaced_under_the_same_names_are_made_anew(tiny_model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder, 5)
    making = Making(batch=3, seed=0, progress=SilentProgress(), path=tmp_path / "tokens.bin")
    first = tokens_of(tiny_model, folder, 10, making)
    for path in list_images(folder):
        before, pixels = path.stat(), np.asarray(Image.open(path))
        Image.fromarray(255 - pixels).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = tokens_of(tiny_model, folder, 10, making)
    assert not torch.equal(second.tokens, first.tokens)
    alone = tokens_of(tiny_model, folder, 10, replace(making, path=None))
    assert torch.equal(second.tokens, alone.tokens)


def test_an_image_that_changes_under_way_ends_the_work(tiny_model: Model, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 5)
    making = Making(batch=3, seed=0, progress=SilentProgress(), path=tmp_path / "tokens.bin")
    (chosen,) = chosen_images(tmp_path / "images", 5, [(10, 0)], SilentProgress())
    before = chosen.files[-1].read_bytes()
    shutil.copy(chosen.files[0], chosen.files[-1])
    with pytest.raises(InputError, match=rf"{chosen.files[-1]}: the image was changed while it was in use"):
        store_from_images(tiny_model, chosen, making)
    chosen.files[-1].write_bytes(before)
    whole = store_from_images(tiny_model, chosen, making)
    assert torch.equal(whole.tokens, store_from_images(tiny_model, chosen, replace(making, path=None)).tokens)


def test_stored_pyramids_that_are_damaged_or_of_another_file_are_made_anew(tiny_model: Model, tmp_path: Path) -> None:
    arguments = {"batch": 4, "seed": 3, "progress": SilentProgress()}
    path, other = tmp_path / "whole.bin", tmp_path / "other.bin"
    expected = store_from_teacher(tiny_model, 10, Making(path=path, **arguments)).tokens
    store_from_teacher(tiny_model, 10, Making(path=other, batch=4, seed=4, progress=SilentProgress()))
    good = path.read_bytes()
    flipped = good[:300] + bytes([good[300] ^ 1]) + good[301:]
    raw = np.random.default_rng(0).integers(0, 32, len(good), dtype=np.uint8).tobytes()
    for damaged in (flipped, other.read_bytes(), raw, good + b"more", good[:-1] + b"\0", b"", bytes(len(good))):
        path.write_bytes(damaged)
        assert torch.equal(store_from_teacher(tiny_model, 10, Making(path=path, **arguments)).tokens, expected)
        assert path.read_bytes() == good
