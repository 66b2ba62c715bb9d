"""Generation: samples equal multinomial's, memory bounds change no sample, low precision and autocast run."""

from typing import Any

import numpy as np
import pytest
import torch

from actvar_convert.errors import InputError
from actvar_convert.files.layout import official_config
from actvar_convert.models import model as model_module
from actvar_convert.models.model import GENERATION_BYTES, Model, images_at_once
from actvar_convert.models.sampling import Noise, chunk_seed, draw, filter_logits
from actvar_convert.models.var import tokenizer as vqvae

LABELS = [0, 1, 2, 3, 4, 5, -1]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(("images", "length", "vocab"), [(1, 1, 3), (3, 4, 32), (5, 9, 257), (2, 16, 4096)])
def test_a_sample_is_that_of_multinomial(images: int, length: int, vocab: int, filtered: bool) -> None:
    logits = 3 * torch.randn(images, length, vocab, generator=torch.Generator().manual_seed(vocab))
    if filtered:
        logits[..., 1::2] = -torch.inf
    generator, noise = torch.Generator().manual_seed(7), Noise(7, images)
    for scale in range(3):
        probability = logits.softmax(-1).flatten(0, 1)
        expected = torch.multinomial(probability, 1, replacement=True, generator=generator).view(images, length)
        assert torch.equal(draw(logits, noise.exponential(scale, length, (vocab,))), expected)


@pytest.mark.parametrize("top_k", [0, 1, 5, 32, 99])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.96, 1.0])
def test_filters_are_those_of_the_reference(top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = (4 * torch.randn(3, 7, 32, generator=generator)).round(decimals=1)  # coarse, so that some are equal
    expected = logits.clone()
    if top_k:
        smallest = logits.topk(min(top_k, 32), sorted=False).values.amin(-1, keepdim=True)
        expected[expected < smallest] = -torch.inf
    if top_p:
        ascending, order = expected.sort(-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        expected[drop.scatter(-1, order, drop)] = -torch.inf
    before = logits.clone()
    assert torch.equal(filter_logits(logits, top_k, top_p), expected)
    assert torch.equal(logits, before)


def test_kept_noise_is_the_same_again() -> None:
    once, kept = Noise(3, 6), Noise(3, 6, keep=True)
    for _ in range(2):
        again = [kept.exponential(scale, length, (5,)) for scale, length in enumerate((1, 4, 9))]
    for scale, numbers in enumerate(again):
        assert torch.equal(numbers, once.exponential(scale, (1, 4, 9)[scale], (5,)))


@pytest.mark.parametrize("at_once", [1, 2, 3, 7])
def test_images_do_not_depend_on_how_many_are_under_way(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=5, chunk=4)
    monkeypatch.setattr(Model, "images_at_once", lambda model: at_once)
    assert torch.equal(tiny_model.generate_tokens(LABELS, seed=5, chunk=4), tokens)
    images = tiny_model.generate(LABELS, seed=5, chunk=4)
    torch.testing.assert_close(images, tiny_model.decode(tokens), rtol=0, atol=1e-5)


def test_chunks_sample_with_generators_of_their_own(tiny_model: Model) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=5, chunk=4)
    second = tiny_model.generate_tokens(LABELS[4:], seed=chunk_seed(5, 1), chunk=4)
    assert torch.equal(tokens[4:], second)


def test_the_bound_on_memory_is_kept(tiny_sparse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_sparse.images_at_once()
    expected = tiny_sparse.generate_tokens(LABELS, seed=2)
    monkeypatch.setitem(model_module.GENERATION_BYTES, "cpu", model_module.GENERATION_BYTES["cpu"] * 2 // whole)
    assert tiny_sparse.images_at_once() == 2
    seen = []
    sample = tiny_sparse._sample
    monkeypatch.setattr(tiny_sparse, "_sample", lambda labels, *rest: seen.append(len(labels)) or sample(labels, *rest))
    assert torch.equal(tiny_sparse.generate_tokens(LABELS, seed=2), expected)
    assert seen == [2, 2, 2, 1]


def test_the_memory_of_pieces_is_bounded(tiny_sparse: Model, memory_watch, monkeypatch: pytest.MonkeyPatch) -> None:
    config, images, peaks = tiny_sparse.config, 12, {}
    noise, pictures = 4 * config.schedule.total * config.vocab * images, 12 * 8 * 8 * images
    bound = GENERATION_BYTES["cpu"] * 2 // tiny_sparse.images_at_once()
    tiny_sparse.generate([0])  # what lasts beyond a generation is there already
    for name in ("whole", "pieces"):
        with memory_watch:
            before, memory_watch.peak = memory_watch.now, 0
            tiny_sparse.generate([1] * images)
            peaks[name] = memory_watch.peak - before
        monkeypatch.setitem(model_module.GENERATION_BYTES, "cpu", bound)
    assert tiny_sparse.images_at_once() == 2
    assert peaks["pieces"] <= bound + noise + pictures
    assert peaks["pieces"] < peaks["whole"] / 2


def test_published_sizes_stream_in_pieces() -> None:
    config, tokenizer = official_config("var-d16")
    assert images_at_once(config, tokenizer, 4, "cpu") == 8
    # per image: keys and values 178 MB, states of a block 34 MB, logits 42 MB; the decoder's maps 252 MB
    assert 8 * 254e6 < GENERATION_BYTES["cpu"] < 9 * 254e6
    if not torch.cuda.is_available():
        for name in ("var-d16", "var-d24", "var-d30"):
            assert images_at_once(*official_config(name), 2, "cuda") >= 64


def test_decoding_streams_too(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=1)
    whole = tiny_model.decode(tokens)
    monkeypatch.setattr(tiny_model, "images_at_once", lambda: 3)
    # convolutions of another batch size sum in another order; by how much depends on the CPU (1.04e-6 was seen)
    torch.testing.assert_close(tiny_model.decode(tokens), whole, rtol=0, atol=2e-6)


def test_channels_last_decodes_the_same(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=1)
    tiny_model.tokenizer.to(torch.bfloat16)
    whole = tiny_model.decode(tokens)
    monkeypatch.setattr(vqvae, "CHANNELS_LAST", ("cpu",))
    x = torch.zeros(1, 64, 4, 4, dtype=torch.bfloat16)
    assert tiny_model.tokenizer.decoder.mid.block_1.conv1(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(tiny_model.decode(tokens), whole, rtol=0, atol=0.05)
    assert all(parameter.is_contiguous() for parameter in tiny_model.parameters())


def test_where_noise_comes_from(tiny_model: Model) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=5)
    assert torch.equal(tiny_model.generate_tokens(LABELS, seed=5, noise="cpu"), tokens)
    with pytest.raises(InputError, match="device or cpu"):
        tiny_model.generate(LABELS, noise="gpu")


def test_nothing_to_generate(tiny_model: Model) -> None:
    assert tiny_model.generate([]).shape == (0, 3, 8, 8)
    assert tiny_model.generate_tokens([]).shape == (0, 30)
    with pytest.raises(InputError, match="at least 1"):
        tiny_model.generate([0], chunk=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sparse"])
def test_low_precision_generates(request: pytest.FixtureRequest, kind: str, dtype: torch.dtype) -> None:
    model: Model = request.getfixturevalue(kind)
    exact = model.generate(LABELS, seed=1)
    drawn = model.generate_tokens(LABELS, seed=1)
    with torch.autocast("cpu", dtype):
        mixed = model.generate(LABELS, seed=1)
    model.transformer.to(dtype)
    low = model.generate(LABELS, seed=1)
    agreement = float((model.generate_tokens(LABELS, seed=1) == drawn).double().mean())
    assert agreement > 0.5, "rounding turns some samples, and what follows from them"
    for images in (mixed, low):
        assert images.dtype == torch.float32 and images.shape == exact.shape
        assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


INTEGERS = [
    3,
    [3],
    (3,),
    range(3, 4),
    np.int32(3),
    np.array(3),
    np.array([3], np.uint8),
    np.array([3], ">i4"),
    np.array([3, 1, 2], np.uint64)[::-1][-1:],
    torch.tensor(3),
    torch.tensor([3], dtype=torch.int16),
    torch.tensor([3], dtype=torch.uint16),
    [torch.tensor(3)],
    [np.int64(3)],
]


@pytest.mark.parametrize("labels", INTEGERS, ids=repr)
def test_labels_of_any_integer_type_are_labels(tiny_model: Model, labels: object) -> None:
    found = tiny_model.family.condition(tiny_model.config, labels).values
    assert torch.equal(found, torch.tensor([3])) and found.dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1.9], "must be whole numbers within 0 to 4, or -1 for no class; got numbers of the dtype torch.float64"),
        ([1.0], "got numbers of the dtype torch.float64"),
        (torch.tensor([1.0]), "got numbers of the dtype torch.float32"),
        ([True, False], "got numbers of the dtype torch.bool"),
        (np.array([1 + 0j]), "got numbers of the dtype torch.complex128"),
        (torch.eye(5).long()[:2], r"one number an image, got the shape \[2, 5\]. Of one-hot rows give labels.argmax"),
        (np.array([2**64 - 1], np.uint64), "must be whole numbers"),
        (torch.tensor([2**64 - 1], dtype=torch.uint64), "must be whole numbers"),
        ([2**70], "must be whole numbers"),
        (["1"], "must be whole numbers"),
        (None, "must be whole numbers"),
        ([[0], [1, 2]], "must be whole numbers"),
        ([0, 6], "got 6"),
        ([0, -2], "got -2"),
    ],
    ids=repr,
)
def test_what_is_no_class_is_refused(tiny_model: Model, labels: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny_model.generate(labels)


def test_seeds_chunks_and_filters_are_whole_numbers_of_any_type(tiny_model: Model) -> None:
    expected = tiny_model.generate([0, 1], seed=3, chunk=1, sampling=tiny_model.sampling_with(2.0, 4, 0.5))
    sampling = tiny_model.sampling_with(np.float32(2), np.int16(4), np.float64(0.5))
    found = tiny_model.generate([0, 1], seed=np.arange(4)[3], chunk=torch.tensor(1), sampling=sampling)
    assert torch.equal(found, expected)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("seed must be a whole number within 0 to 9223372036854775807, got 1.0", {"seed": 1.0}),
        ("seed must be .* got -1", {"seed": -1}),
        ("seed must be .* got 9223372036854775808", {"seed": 2**63}),
        ("seed must be .* got True", {"seed": True}),
        ("seed must be", {"seed": torch.tensor(1.5)}),
        ("chunk must be a whole number of at least 1, got 0", {"chunk": 0}),
        ("chunk must be .* got 2.5", {"chunk": 2.5}),
        ("top_k must be .* got 2.5", {"sampling": tiny_model.sampling_with(top_k=2.5)}),
        ("top_k must be .* got -1", {"sampling": tiny_model.sampling_with(top_k=-1)}),
        ("cfg must be a number, got nan", {"sampling": tiny_model.sampling_with(cfg=float("nan"))}),
        ("cfg must be a number, got '3'", {"sampling": tiny_model.sampling_with(cfg="3")}),
        ("top_p must be within 0 to 1", {"sampling": tiny_model.sampling_with(top_p=1.5)}),
    ]
    for said, arguments in wrong:
        with pytest.raises(InputError, match=said):
            tiny_model.generate([0], **arguments)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sparse"])
def test_what_is_returned_is_used_like_any_other_tensor(kind: str, request: pytest.FixtureRequest) -> None:
    """In a training loop of one's own: generated tokens are inputs, losses have gradients, images change in place."""
    model: Model = request.getfixturevalue(kind)
    tokens = model.generate_tokens([0, 1], seed=0)
    images, decoded = model.generate([0, 1], seed=0), model.decode(tokens)
    assert torch.equal(images, decoded)
    assert not any(each.is_inference() or each.requires_grad for each in (tokens, images, decoded))
    images.mul_(255)
    tokens[0, 0] = 1
    model.requires_grad_(True)
    condition = model.family.condition(model.config, [0, 1])
    inputs = model.teacher_forcing_input(tokens)
    model.transformer(condition, inputs).square().mean().backward()
    assert model.transformer.head.weight.grad is not None
    with torch.no_grad():
        assert torch.equal(model.teacher_forcing_input(tokens), inputs)
    decoded.requires_grad_(True).square().sum().backward()
    with torch.inference_mode():
        assert torch.equal(model.generate_tokens([0, 1], seed=0)[1], tokens[1])
