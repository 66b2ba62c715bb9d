"""Classifiers as feature extractors: single images and mosaics of four."""

from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from actvar_convert.errors import InputError
from actvar_convert.measure.extractors import ClassifierExtractor, QuadrantExtractor, Reference, read_statistics
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.model import Model

QUADRANTS = [[label, (label + 1) % 5, (label + 2) % 5, (label + 3) % 5] for label in range(5)]


@pytest.fixture
def classifier() -> FashionClassifier:
    torch.manual_seed(3)
    classifier = FashionClassifier(classes=5).eval()
    with torch.no_grad():
        classifier.head.weight.mul_(20)
    return classifier


def mosaics_of(classifier: FashionClassifier, **changes: object) -> QuadrantExtractor:
    settings: dict[str, object] = {"quadrants": QUADRANTS, "name": "tiny", "image_size": 16, **changes}
    return QuadrantExtractor(classifier, torch.zeros(2, 512), **settings)  # type: ignore[arg-type]


def test_every_quadrant_is_judged_on_its_own(classifier: FashionClassifier) -> None:
    image = torch.rand(3, 3, 16, 16)
    single = ClassifierExtractor(copy.deepcopy(classifier), torch.zeros(2, 128), name="one", image_size=8)
    parts = [single(image[:, :, y : y + 8, x : x + 8]) for y in (0, 8) for x in (0, 8)]
    extractor = mosaics_of(classifier)
    features, logits = extractor(image)
    assert features.shape == (3, 512) == (3, extractor.feature_dim) and logits.shape == (3, 6)
    torch.testing.assert_close(features, torch.cat([part[0] for part in parts], 1))

    p = [part[1].double().softmax(-1) for part in parts]
    for i in range(3):
        products = [
            float(torch.stack([p[q][i, label] for q, label in enumerate(labels)]).prod()) for labels in QUADRANTS
        ]
        found = logits[i].double().exp().tolist()
        assert found[:5] == pytest.approx(products, rel=1e-4, abs=1e-12)
        assert found[5] == pytest.approx(1 - sum(products), rel=1e-4)


def test_a_mosaic_counts_as_its_class_only_if_all_quadrants_do(classifier: FashionClassifier) -> None:
    extractor = mosaics_of(classifier)
    sure = torch.tensor([[8.0 * (label == q) for label in range(5)] for q in QUADRANTS[2]])
    with torch.no_grad():  # features that are the labels: the class is decided by the head alone
        classifier.head.weight.zero_()
        classifier.head.weight[:, :5] = torch.eye(5)
        classifier.head.bias.zero_()
    features = torch.zeros(8, 128)
    features[:4, :5], features[4:, :5] = sure, sure
    features[7, :5] = 8.0 * torch.nn.functional.one_hot(torch.tensor(QUADRANTS[3][3]), 5)
    classifier.features = lambda image: features  # type: ignore[method-assign,assignment]
    _, logits = extractor(torch.zeros(2, 3, 16, 16))
    assert logits.argmax(1).tolist() == [2, 5], "one wrong quadrant makes it none of the classes"
    assert logits.isfinite().all()


def test_which_models_it_can_judge(classifier: FashionClassifier, tiny_model: Model) -> None:
    assert tiny_model.tokenizer.config.image_size == 8
    assert mosaics_of(classifier, image_size=8).problems(tiny_model) == []
    assert mosaics_of(classifier, quadrants=QUADRANTS[:4]).problems(tiny_model) == [
        "images of 8 x 8 pixels; tiny knows 16 x 16",
        "5 classes; tiny knows 4",
    ]


def test_the_fingerprint_covers_the_classes(classifier: FashionClassifier) -> None:
    prints = {
        ClassifierExtractor(classifier, torch.zeros(2, 128), name="one").fingerprint,
        mosaics_of(classifier).fingerprint,
        mosaics_of(classifier, quadrants=QUADRANTS[::-1]).fingerprint,
    }
    assert len(prints) == 3


def test_the_real_images_have_a_fingerprint() -> None:
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    known = Reference.of(features)
    alone, shifted = (Reference(known.mean_F + more, known.covariance_FF) for more in (0, 1))
    assert known.fingerprint == Reference.of(features.clone()).fingerprint
    assert len({known.fingerprint, Reference.of(2 * features).fingerprint, alone.fingerprint, shifted.fingerprint}) == 4
    computed = [Reference.of(features * scale, "one folder") for scale in (1, 1 + 1e-6)]
    assert computed[0].fingerprint == computed[1].fingerprint, "whatever the device makes of the last digits"


def test_statistics_are_read_in_any_real_dtype_and_order(tmp_path: Path) -> None:
    sigma = np.asfortranarray(np.arange(9, dtype=np.float32).reshape(3, 3))
    np.savez_compressed(tmp_path / "s.npz", mu=np.arange(3), sigma=sigma)
    read = read_statistics(tmp_path / "s.npz", 3)
    assert read.mean_F.tolist() == [0, 1, 2] and read.covariance_FF.tolist() == sigma.tolist()


@pytest.mark.parametrize(
    "shape", ["(3,)", "(100000000, 3)", "(3, 3, 3)", "(-1,)", "[" * 5000, "__import__('os').getcwd()"]
)
def test_statistics_are_unpacked_no_further_than_needed(tmp_path: Path, shape: str) -> None:
    """Ten million zeros, packed into little; the header of sigma says anything."""
    path, mean = tmp_path / "s.npz", io.BytesIO()
    np.save(mean, np.zeros(3))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", mean.getvalue())
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        archive.writestr("sigma.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(10**7))
    with pytest.raises(InputError, match=r"no readable \.npz with the arrays mu and sigma"):
        read_statistics(path, 3)
