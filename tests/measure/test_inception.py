"""The optional Inception extractor: its references, and what it says if it cannot run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actvar_convert.errors import InputError
from actvar_convert.measure.extractors import (
    InceptionExtractor,
    folder_images,
    read_statistics,
    real_images,
    require_reference,
)


def test_statistics_are_read(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    path = tmp_path / "reference.npz"
    np.savez(path, mu=mean, sigma=covariance)
    reference = read_statistics(path, 3)
    assert reference.mean_F.tolist() == [0, 1, 2] and reference.covariance_FF[2, 2] == 3
    assert reference.features_NF is None
    with pytest.raises(InputError, match=r"mu has shape \(3,\), \(4,\) is needed"):
        read_statistics(path, 4)


def test_wrong_statistics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    with pytest.raises(InputError, match="mu and sigma"):
        read_statistics(path, 3)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(InputError, match="mu"):
        read_statistics(path, 3)
    np.savez(path, mu=np.array([0, np.nan, 0]), sigma=np.eye(3))
    with pytest.raises(InputError, match="infinite or no numbers"):
        read_statistics(path, 3)
    whole = path.read_bytes()
    for damaged in (b"no archive", whole[:100], whole[:200] + b"xx" + whole[202:], whole[-30:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="mu and sigma"):
            read_statistics(path, 3)


def test_folder_of_images_is_cropped_resized_and_ordered(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "sub" / "b.png")
    Image.fromarray(np.zeros((5, 4, 3), np.uint8)).save(tmp_path / "c.png")
    (tmp_path / "notes.txt").write_text("no image")
    batches = list(folder_images(real_images(tmp_path), 4, batch=2))
    assert [len(batch) for batch in batches] == [2, 1]
    image = torch.cat(batches)
    assert image.shape == (3, 3, 4, 4)
    assert torch.equal(image[0], torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4))
    assert float(image[1].max()) == 0
    assert torch.allclose(image[2], torch.tensor(128 / 255))
    before = real_images(tmp_path)
    Image.fromarray(np.ones((5, 4, 3), np.uint8)).save(tmp_path / "c.png")
    after = real_images(tmp_path)
    assert list(before) == list(after) and [name.name for name in before if before[name] != after[name]] == ["c.png"]
    with pytest.raises(InputError, match=r"c\.png: the image was changed while it was in use"):
        list(folder_images(before, 4))


def test_folder_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 images found"):
        require_reference(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.png"):
        (tmp_path / name).write_bytes(b"broken")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    with pytest.raises(InputError, match=r"3 of 4 images .*in the folder itself: 2 of 3, sub: 1 of 1") as caught:
        require_reference(tmp_path)
    assert [problem.split(": ")[0].rsplit("/", 1)[1] for problem in caught.value.problems] == [
        "a.png",
        "b.png",
        "c.png",
    ]


def test_linked_folders_count_as_real_images(tmp_path: Path) -> None:
    for label in range(10):
        (tmp_path / "elsewhere" / str(label)).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4), (label, number, 0)).save(tmp_path / "elsewhere" / str(label) / f"{number}.png")
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere" / "0").rename(tmp_path / "real" / "0")
    for label in range(1, 10):
        (tmp_path / "real" / str(label)).symlink_to(tmp_path / "elsewhere" / str(label))
    assert len(real_images(tmp_path / "real")) == 20


def test_reference_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of images"):
        InceptionExtractor(tmp_path / "nowhere")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="the optional extra is installed")
def test_missing_extra_says_how_to_install_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    with pytest.raises(InputError, match="pip install"):
        InceptionExtractor(tmp_path)
