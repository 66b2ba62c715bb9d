"""The tools of the bundled model, from the data's files to the package's, in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import bundle_fashion
import pytest
import train_fashion

from actvar_convert.files import bundled as zoo

from .conftest import HELD_OUT, tiny


def test_from_data_to_bundle(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(train_fashion.TRANSFORMER)
    tokenizer = train_fashion.TOKENIZER.model_copy(update={"ch_mult": (1, 1, 1)})
    for module in (train_fashion, bundle_fashion):
        monkeypatch.setattr(module, "TRANSFORMER", config)
        monkeypatch.setattr(module, "TOKENIZER", tokenizer)
        monkeypatch.setattr(module, "HELD_OUT", HELD_OUT)
    work, out = tmp_path / "work", tmp_path / "bundle"
    common = ["--data", str(data), "--work", str(work), "--device", "cpu"]
    shrunk = ["--guidance", "1", "--grid-images", "20", "--images", "20", "--real-images", "20"]
    bundle = [*common, "--machine", "a test", "--out", str(out), *shrunk]
    work.mkdir()
    with pytest.raises(SystemExit):
        bundle_fashion.main(bundle)
    short = ["--classifier-epochs", "1", "--vqvae-epochs", "1", "--var-steps", "3", "--grow-at", "1", "--batch", "8"]
    train_fashion.main([*common, *short])
    bundle_fashion.main(bundle)

    model = zoo.load_bundled(out)
    assert model.config == config and model.tokenizer.config == tokenizer and model.sampling.cfg == 1
    assert zoo.bundled_reference_features(out).shape == (20, 128)
    stored = json.loads((out / "config.json").read_text())
    figures = stored["figures"]
    assert len(stored["classes"]) == 10 and "quadrants" not in stored
    assert figures["steps"] == 3 and figures["test_images"] == figures["floor_images"] == 20
    assert figures["generated"]["images"] == 20 and len(figures["guidance"]) == 1
    assert f"| 1 | 20 | {figures['generated']['fid']:.3f} |" in (out / "README.md").read_text()
