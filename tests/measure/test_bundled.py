"""The bundled classifier as a feature extractor."""

from __future__ import annotations

import pytest
import torch

from actvar_convert.errors import InputError
from actvar_convert.files import bundled as zoo
from actvar_convert.measure.extractors import bundled_extractor
from actvar_convert.measure.fid import frechet_inception_distance
from actvar_convert.models.var.tokenizer import VQVAE


def test_unknown_bundle_is_named() -> None:
    with pytest.raises(InputError, match="no bundled model is called 'fashoin'"):
        bundled_extractor("fashoin")


@pytest.mark.skipif("fashion" not in zoo.bundled_names(), reason="the bundle has not been written yet")
def test_bundled_extractor_judges_the_bundled_model() -> None:
    extractor, model = bundled_extractor("fashion"), zoo.load_bundled("fashion")
    figures = zoo.bundled_config("fashion")["figures"]
    assert extractor.problems(model) == []
    assert extractor.tokenizer_distance(model.tokenizer) == pytest.approx(figures["fid_tokenizer"])
    assert extractor.tokenizer_distance(VQVAE(model.tokenizer.config)) is None
    reference = extractor.reference()
    assert reference.features_NF is not None and reference.features_NF.shape == (10000, extractor.feature_dim)

    labels = torch.arange(20) % 10
    features, logits = extractor(model.generate(labels, seed=0))
    assert features.shape == (20, extractor.feature_dim) and logits.shape == (20, 10)
    assert float((logits.argmax(1) == labels).double().mean()) > 0.5
    noise, _ = extractor(torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert frechet_inception_distance(features, reference) < frechet_inception_distance(noise, reference)
