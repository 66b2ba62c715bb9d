"""The optional Inception extractor: its references, and what it says if it cannot run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actvar_convert.errors import InputError
from actvar_convert.measure.extractors import InceptionExtractor, folder_images, images_fingerprint, read_statistics


def test_statistics_are_read(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    path = tmp_path / "reference.npz"
    np.savez(path, mu=mean, sigma=covariance)
    reference = read_statistics(path, 3)
    assert reference.mean_F.tolist() == [0, 1, 2] and reference.covariance_FF[2, 2] == 3
    assert reference.features_NF is None
    with pytest.raises(InputError, match=r"4 features need \[4\]"):
        read_statistics(path, 4)


def test_wrong_statistics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    with pytest.raises(InputError, match="mu and sigma"):
        read_statistics(path, 3)
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(InputError, match="mu"):
        read_statistics(path, 3)
    path.write_bytes(b"no archive")
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
    batches = list(folder_images(tmp_path, 4, batch=2))
    assert [len(batch) for batch in batches] == [2, 1]
    image = torch.cat(batches)
    assert image.shape == (3, 3, 4, 4)
    assert torch.equal(image[0], torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4))
    assert float(image[1].max()) == 0
    assert torch.allclose(image[2], torch.tensor(128 / 255))
    before = images_fingerprint(tmp_path, 4)
    assert images_fingerprint(tmp_path, 4) == before != images_fingerprint(tmp_path, 5)
    Image.fromarray(np.ones((5, 4, 3), np.uint8)).save(tmp_path / "c.png")
    assert images_fingerprint(tmp_path, 4) != before


def test_folder_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 images found"):
        next(folder_images(tmp_path, 4))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
        next(folder_images(tmp_path, 4))


def test_reference_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of images"):
        InceptionExtractor(tmp_path / "nowhere")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="the optional extra is installed")
def test_missing_extra_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pip install"):
        InceptionExtractor(tmp_path)
