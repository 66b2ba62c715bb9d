"""The tools of the second teacher, from the data's files to an evaluation by name, in a few steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import bundle_mosaics
import pytest
import torch
import train_mosaics
from bundling import LARGEST_BUNDLE
from mosaics import QUADRANTS, Mosaics
from torch import Tensor

import actvar_convert as av
from actvar_convert.errors import InputError
from actvar_convert.files import bundled as zoo
from actvar_convert.measure.extractors import QuadrantExtractor
from actvar_convert.measure.fid import frechet_inception_distance
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.sampling import balanced_labels
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.origins import class_names
from actvar_convert.verbs import extractor_for

from .conftest import HELD_OUT, assert_equal_checkpoints, tiny

CONFIG = tiny(train_mosaics.PRESETS["cpu"].transformer)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU preset with a tiny transformer and a few steps, on little data."""
    preset = train_mosaics.Preset(CONFIG, vqvae_steps=2, vqvae_batch=2, var_steps=3, grow_at=1, batch=2, coarse_until=2)
    monkeypatch.setitem(train_mosaics.PRESETS, "cpu", preset)
    monkeypatch.setattr(train_mosaics, "HELD_OUT", HELD_OUT)
    monkeypatch.setattr(train_mosaics, "HELD_OUT_MOSAICS", 4)
    monkeypatch.setattr(bundle_mosaics, "SCALE_IMAGES", 2)


def options(data: Path, work: Path) -> list[str]:
    return ["--data", str(data), "--work", str(work), "--device", "cpu"]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Makes the draw with this seed fail, as Ctrl-C would."""
    draw = Mosaics.draw

    def interrupted(self: Mosaics, batch: int, seed_: int) -> tuple[Tensor, Tensor]:
        if seed_ == seed:
            raise KeyboardInterrupt
        return draw(self, batch, seed_)

    monkeypatch.setattr(Mosaics, "draw", interrupted)


def test_the_presets_fit_the_pyramid() -> None:
    for preset in train_mosaics.PRESETS.values():
        assert preset.transformer.sides == train_mosaics.TOKENIZER.sides == train_mosaics.SIDES
        assert preset.transformer.depth % 2 == 0 and preset.transformer.hidden % 16 == 0
        parts = (VARTransformer(preset.transformer), VQVAE(train_mosaics.TOKENIZER), FashionClassifier())
        stored = 2 * sum(value.numel() for part in parts for value in part.parameters()) + 2 * 5000 * 512
        assert stored < 0.995 * LARGEST_BUNDLE, "in half precision, with the features of 5,000 mosaics"
    assert train_mosaics.TOKENIZER.image_size == 64 and train_mosaics.TOKENIZER.schedule.total == 680


def test_the_tokenizer_starts_from_that_of_single_images() -> None:
    source, vae = zoo.load_bundled("fashion").tokenizer, VQVAE(train_mosaics.TOKENIZER)
    assert train_mosaics.take_over(vae, source) == ["quantize.ema_vocab_hit_SV"]
    assert torch.equal(vae.quantize.embedding.weight, source.quantize.embedding.weight)


def test_a_work_folder_keeps_its_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_mosaics.preset_of(tmp_path, None) == "cpu"
    assert train_mosaics.preset_of(tmp_path, None, default="gpu") == "cpu"
    with pytest.raises(SystemExit):
        train_mosaics.main(["--data", "nowhere", "--work", str(tmp_path), "--preset", "gpu"])
    assert "holds a training with --preset cpu; leave gpu out" in capsys.readouterr().err
    assert train_mosaics.preset_of(tmp_path / "other", "gpu") == "gpu"


def test_from_data_to_evaluation(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = options(data, tmp_path / "whole"), options(data, tmp_path / "resumed")
    train_mosaics.main(whole)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "vqvae.pt", tmp_path / "resumed")
    with monkeypatch.context() as patch:
        interrupt_at(patch, train_mosaics.VAR_SEED + 2)
        with pytest.raises(KeyboardInterrupt):
            train_mosaics.main([*resumed, "--every", "1"])
    train_mosaics.main(resumed)
    assert_equal_checkpoints(tmp_path / "whole" / "var.pt", tmp_path / "resumed" / "var.pt")

    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "fashion").symlink_to(zoo.bundled_folder("fashion"))
    monkeypatch.setattr(zoo, "assets_folder", lambda: assets)
    shrunk = ["--guidance", "1", "--grid-images", "20", "--images", "20", "--real-images", "20"]
    bundle_mosaics.main([*whole, "--machine", "a test", "--out", str(assets / "mosaics"), *shrunk])

    model = av.load("mosaics")
    assert model.config == CONFIG and model.tokenizer.config == train_mosaics.TOKENIZER
    assert class_names(model)[:2] == ["T-shirt", "trouser"]
    figures = zoo.bundled_config("mosaics")["figures"]
    assert len(figures["vqvae_test_mse_after_scales"]) == 10 and figures["preset"] == "cpu"
    extractor = extractor_for(model)
    assert isinstance(extractor, QuadrantExtractor) and extractor.name == "mosaics classifier"
    assert extractor.labels_K4.tolist() == QUADRANTS and zoo.bundled_reference_features("mosaics").shape == (20, 512)
    assert extractor.tokenizer_distance(model.tokenizer) == pytest.approx(figures["fid_tokenizer"])
    assert extractor_for(zoo.load_bundled("fashion")).name == "fashion classifier"
    card = (assets / "mosaics" / "README.md").read_text()
    assert f"| 1 | 20 | {figures['generated']['fid']:.3f} |" in card
    assert "| T-shirt, trouser, dress, sneaker |" in card

    labels = balanced_labels(20, 10)
    features, logits = extractor(model.generate(labels, seed=0, chunk=64))
    assert features.shape == (20, extractor.feature_dim) and logits.shape == (20, 11)
    assert float((logits.argmax(1) == labels).double().mean()) == figures["generated"]["label_agreement"]
    distance = frechet_inception_distance(features, extractor.reference())
    assert distance == pytest.approx(figures["generated"]["fid"])


def test_models_that_no_bundled_classifier_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.load_bundled("fashion")
    monkeypatch.setattr(zoo, "assets_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="no bundled classifier can judge"):
        extractor_for(model)
