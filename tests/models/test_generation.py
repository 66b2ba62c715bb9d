"""Generation: draws equal multinomial's, memory bounds change no draw, low precision and autocast run."""

import pytest
import torch

from actvar_convert.errors import InputError
from actvar_convert.models import model as model_module
from actvar_convert.models.model import Noise, VARModel, chunk_seed, draw
from actvar_convert.models.sparse import SparseVARModel

LABELS = [0, 1, 2, 3, 4, 5, -1]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(("images", "length", "vocab"), [(1, 1, 3), (3, 4, 32), (5, 9, 257), (2, 16, 4096)])
def test_a_draw_is_that_of_multinomial(images: int, length: int, vocab: int, filtered: bool) -> None:
    logits = 3 * torch.randn(images, length, vocab, generator=torch.Generator().manual_seed(vocab))
    if filtered:
        logits[..., 1::2] = -torch.inf
    generator, noise = torch.Generator().manual_seed(7), Noise(7, images)
    for scale in range(3):
        probability = logits.softmax(-1).flatten(0, 1)
        expected = torch.multinomial(probability, 1, replacement=True, generator=generator).view(images, length)
        assert torch.equal(draw(logits, noise.exponential(scale, length, vocab)), expected)


def test_kept_noise_is_the_same_again() -> None:
    once, kept = Noise(3, 6), Noise(3, 6, keep=True)
    for _ in range(2):
        again = [kept.exponential(scale, length, 5) for scale, length in enumerate((1, 4, 9))]
    for scale, numbers in enumerate(again):
        assert torch.equal(numbers, once.exponential(scale, (1, 4, 9)[scale], 5))


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_images_do_not_depend_on_how_many_are_under_way(tiny_model: VARModel, at_once: int) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=5, chunk=4, at_once=100)
    assert torch.equal(tiny_model.generate_tokens(LABELS, seed=5, chunk=4, at_once=at_once), tokens)
    images = tiny_model.generate(LABELS, seed=5, chunk=4, at_once=at_once)
    torch.testing.assert_close(images, tiny_model.decode(tokens), rtol=0, atol=1e-5)


def test_chunks_draw_from_generators_of_their_own(tiny_model: VARModel) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=5, chunk=4)
    second = tiny_model.generate_tokens(LABELS[4:], seed=chunk_seed(5, 1), chunk=4)
    assert torch.equal(tokens[4:], second)


def test_the_bound_on_memory_is_kept(tiny_sparse: SparseVARModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_sparse.images_at_once()
    expected = tiny_sparse.generate_tokens(LABELS, seed=2)
    monkeypatch.setitem(model_module.GENERATION_BYTES, "cpu", model_module.GENERATION_BYTES["cpu"] * 2 // whole)
    assert tiny_sparse.images_at_once() == 2
    seen = []
    sample = tiny_sparse._sample
    monkeypatch.setattr(tiny_sparse, "_sample", lambda labels, *rest: seen.append(len(labels)) or sample(labels, *rest))
    assert torch.equal(tiny_sparse.generate_tokens(LABELS, seed=2), expected)
    assert seen == [2, 2, 2, 1]


def test_nothing_to_generate(tiny_model: VARModel) -> None:
    assert tiny_model.generate([]).shape == (0, 3, 8, 8)
    assert tiny_model.generate_tokens([]).shape == (0, 30)
    with pytest.raises(InputError, match="at least 1"):
        tiny_model.generate([0], at_once=0)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sparse"])
def test_low_precision_generates(request: pytest.FixtureRequest, kind: str) -> None:
    model: VARModel = request.getfixturevalue(kind)
    exact = model.generate(LABELS, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.generate(LABELS, seed=1)
    model.transformer.to(torch.bfloat16)
    low = model.generate(LABELS, seed=1)
    for images in (mixed, low):
        assert images.dtype == torch.float32 and images.shape == exact.shape
        assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
