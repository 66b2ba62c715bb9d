"""Bundled models: what is written comes back in half precision, in files of limited size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files import bundled as zoo
from actvar_convert.models.base import Sampling
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.model import Model

CONFIG: dict[str, Any] = {"sampling": {"cfg": 2.0, "top_k": 10, "top_p": 0.9}, "classes": ["a", "b", "c", "d", "e"]}


@pytest.fixture
def classifier() -> FashionClassifier:
    torch.manual_seed(0)
    return FashionClassifier(5).eval()


def _write(folder: Path, dense: Model, classifier: FashionClassifier, limit: int = 200_000) -> Path:
    features = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    zoo.write_bundle(folder, dense.transformer, dense.tokenizer, classifier, features, CONFIG, limit)
    return folder


def test_round_trip(tmp_path: Path, dense: Model, classifier: FashionClassifier) -> None:
    folder = _write(tmp_path / "tiny", dense, classifier)
    shards = list(folder.glob("var-*-of-*.safetensors"))
    assert len(shards) > 1 and (folder / "var.safetensors.index.json").is_file()
    assert max(file.stat().st_size for file in shards) < 210_000
    model = zoo.load_bundled(folder)
    assert model.sampling == Sampling(2.0, 10, 0.9)
    assert model.config == dense.config and model.tokenizer.config == dense.tokenizer.config
    for name, tensor in dense.state_dict().items():
        read = model.state_dict()[name]
        assert torch.equal(read, tensor.half().float() if tensor.is_floating_point() else tensor), name
    image = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = zoo.load_bundled_classifier(folder)(image)
        torch.testing.assert_close(logits, classifier(image), rtol=0, atol=2e-3)
    features = zoo.bundled_reference_features(folder)
    assert features.shape == (50, 128) and features.dtype == torch.float32


def test_rewriting_keeps_the_card_and_drops_old_shards(
    tmp_path: Path, dense: Model, classifier: FashionClassifier
) -> None:
    folder = _write(tmp_path / "tiny", dense, classifier)
    (folder / "README.md").write_text("card")
    _write(folder, dense, classifier, limit=1_000_000_000)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "classifier.safetensors", "config.json", "reference_features.safetensors", "vae.safetensors",
        "var.safetensors",
    ]  # fmt: skip


def test_half_precision_that_overflows_is_refused(tmp_path: Path, dense: Model, classifier: FashionClassifier) -> None:
    with torch.no_grad():
        classifier.head.bias[0] = 1e6
    with pytest.raises(InputError, match=r"classifier: head\.bias"):
        _write(tmp_path / "tiny", dense, classifier)
    assert not list(tmp_path.iterdir())


def test_config_that_does_not_describe_the_weights(tmp_path: Path, dense: Model, classifier: FashionClassifier) -> None:
    folder = _write(tmp_path / "tiny", dense, classifier)
    content = json.loads((folder / "config.json").read_text())
    content["transformer"]["classes"] = 7
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"not those that its config\.json describes"):
        zoo.load_bundled(folder)


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="no bundled model is called 'nope'"):
        zoo.bundled_folder("nope")


@pytest.mark.parametrize("name", zoo.bundled_names())
def test_models_in_the_package(name: str) -> None:
    folder = zoo.bundled_folder(name)
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert max(sizes) <= 16e6 and sum(sizes) <= 28e6
    model = zoo.load_bundled(name)
    assert model.origin["name"] == name
    assert len(zoo.bundled_config(name)["classes"]) == model.config.classes
    config = zoo.bundled_config(name)
    pieces = 4 if "quadrants" in config else 1
    width = pieces * zoo.load_bundled_classifier(name).feature_dim
    assert zoo.bundled_reference_features(name).shape == (config["figures"]["test_images"], width)
    assert model.generate([0]).isfinite().all()
