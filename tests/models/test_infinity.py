"""Infinity beyond the golden values: text rows, schedules, square tokens, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import actvar_convert as av
from actvar_convert.cost.flops import count_flops
from actvar_convert.errors import InputError
from actvar_convert.files.skeleton import empty_backbone
from actvar_convert.models.base import Call, Sampling
from actvar_convert.models.generation import Generation
from actvar_convert.models.infinity.config import BSQConfig, InfinityConfig
from actvar_convert.models.infinity.schedules import RATIOS, SIZES, largest, published
from actvar_convert.models.model import Model
from actvar_convert.models.schedule import Schedule
from tests.infinity_model import prompts, square_model
from tests.models.test_graphs import without_values


@pytest.fixture(scope="module")
def model() -> Model:
    return square_model()


def test_the_published_schedules() -> None:
    totals = {size: Schedule(RATIOS[1.0][:scales]).total for size, scales in SIZES.items()}
    assert totals == {"0.06M": 521, "0.25M": 2521, "0.60M": 6425, "1M": 10521}
    assert len(RATIOS) == 15
    largest_size = [Schedule(maps).total for maps in RATIOS.values()]
    assert (min(largest_size), max(largest_size)) == (10521, 11269)
    for ratio, maps in RATIOS.items():
        assert all(largest(Schedule(maps[:scales])) == maps[-1] for scales in SIZES.values()), ratio
    assert published("0.25M@0.75").maps[-1] == (27, 36) and published("1M").maps[-1] == (64, 64)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("2M", "0.06M, 0.25M, 0.60M, 1M"),
        ("1M@1.1", "0.333, 0.4, 0.5"),
        ([(1, 1), (5, 7)], "no published schedule has the ratio of a map of 5 x 7"),
        ([(4, 4), (1, 1)], "from coarse to fine"),
        ([(1, 1)] * 16, "16 scales, and the model knows 15 levels"),
        (7, "a list of maps"),
    ],
)
def test_a_schedule_that_is_none_is_refused(model: Model, schedule: Any, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        model.generate_tokens(prompts(model, 3), schedule=schedule)


def test_square_tokens_generation_equals_teacher_forcing(model: Model) -> None:
    rows = prompts(model, 3, 8, 5)
    for schedule in (model.schedule.maps, "0.06M@1.5"):
        bits = model.generate_tokens(rows, cfg=1, top_k=1, tau=1.0, schedule=schedule).clone()
        there = model.at(schedule)
        assert bits.shape == (3, there.schedule.total, 16)
        with torch.no_grad():
            logits = there.transformer(rows, there.teacher_forcing_input(bits))
        assert float((logits.unflatten(-1, (-1, 2)).argmax(-1) == bits).double().mean()) > 0.999


def test_square_tokens_are_what_the_encoder_makes_of_an_image(model: Model) -> None:
    images = torch.rand(2, 3, *model.tokenizer.image_size(model.schedule), generator=torch.Generator().manual_seed(0))
    bits = model.tokenizer.encode(images * 2 - 1, model.schedule)
    assert bits.shape == (2, model.schedule.total, 16)
    features = model.tokenizer.features(images * 2 - 1)
    means = torch.nn.functional.interpolate(features, size=(2, 2), mode="area")
    first = (means > 0).long()  # the four codes of the first token, channel by channel
    assert torch.equal(bits[:, 0].view(2, 4, 2, 2), first)
    decoded = model.tokenizer.decode(bits, model.schedule)
    torch.testing.assert_close(model.decode(bits) * 2 - 1, decoded)


def test_images_do_not_depend_on_what_is_generated_beside_them(model: Model) -> None:
    rows = prompts(model, 3, 8, 5)
    together = model.generate_tokens(rows, cfg=2.5, top_k=1)
    alone = torch.cat([model.generate_tokens(rows.rows(slice(i, i + 1)), cfg=2.5, top_k=1) for i in range(3)])
    assert float((together == alone).double().mean()) > 0.999


def test_a_negative_prompt_takes_the_place_of_none(model: Model) -> None:
    rows, other = prompts(model, 4, 6), prompts(model, 2)
    plain, same = (model.generate_tokens(rows, cfg=3, seed=1, **more) for more in ({}, {"negative": rows}))
    away = model.generate_tokens(rows, cfg=3, seed=1, negative=other)
    unguided = model.generate_tokens(rows, cfg=1, seed=1)
    assert torch.equal(same, unguided), "guided away from itself a prompt is not guided"
    assert not torch.equal(away, plain)
    with pytest.raises(InputError, match="3 negative prompts for 2 prompts"):
        model.generate(rows, negative=prompts(model, 1, 2, 3))


def test_guidance_and_temperature_by_scale(model: Model) -> None:
    rows = prompts(model, 4)
    one = model.generate_tokens(rows, cfg=2.0, tau=0.5)
    assert torch.equal(one, model.generate_tokens(rows, cfg=[2.0] * 5, tau=[0.5] * 5))
    late = model.generate_tokens(rows, cfg=[2.0] * 4 + [1.0], tau=0.5)
    assert torch.equal(late[:, : -8 * 8], one[:, : -8 * 8]) and not torch.equal(late, one)
    for wrong, words in (
        ({"cfg": [1.0, 2.0]}, "cfg has 2 values; give one number, or 5"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"cfg": float("nan")}, "cfg must be a number"),
        ({"guidance_layer": 2}, "guidance_layer 2 is no block of 2"),
        ({"guidance_layer": -3}, "guidance_layer -3"),
    ):
        with pytest.raises(InputError, match=words):
            model.generate(rows, **wrong)


def test_text_rows_that_do_not_fit_are_refused(model: Model) -> None:
    rows = prompts(model, 4)
    for given, words in (
        (av.TextRows(torch.zeros(4, 47), [4]), "47 channels, the model reads 48"),
        (av.TextRows(torch.zeros(11, 48), [2, 9]), "more than 8 text rows.*prompt 1 of 9"),
        ([0, 1], "makes images of text rows"),
    ):
        with pytest.raises(InputError, match=words):
            model.generate(given)
    for values, lengths, words in (
        (torch.zeros(4, 48), [3], "add up to 3 text rows, and there are 4"),
        (torch.zeros(4, 48), [4, 0], "at least one text row"),
        (torch.zeros(4, 48), [4.0], "whole numbers"),
        (torch.zeros(48), [48], "rows, channels"),
        (torch.zeros(4, 48).long(), [4], "floating-point"),
        (torch.full((4, 48), torch.nan), [4], "NaN"),
    ):
        with pytest.raises(InputError, match=words):
            av.TextRows(values, lengths)
    assert model.generate([rows.values], seed=3).equal(model.generate(rows, seed=3))
    with pytest.raises(InputError, match="37 x 64 pixels; these token maps are of 32 x 32"):
        model.tokenizer.encode(torch.zeros(1, 3, 37, 64), model.schedule)


def test_text_rows_are_kept_in_a_file(model: Model, tmp_path: Path) -> None:
    rows, file = prompts(model, 4, 2), tmp_path / "rows.safetensors"
    rows.save(file)
    again = av.TextRows.load(file)
    assert torch.equal(again.values, rows.values) and again.lengths == (4, 2)
    save_file({"values": rows.values, "lengths": torch.tensor([4, 1])}, tmp_path / "short.safetensors")
    save_file({"x": rows.values}, tmp_path / "other.safetensors")
    (tmp_path / "text.txt").write_text("a cat")
    for name, words in (
        ("short.safetensors", "short.*add up to 5"),
        ("other.safetensors", "no text rows.*it has x"),
        ("text.txt", "no safetensors file"),
        ("none", "none"),
    ):
        with pytest.raises(InputError, match=words):
            av.TextRows.load(tmp_path / name)


SHAPES = {
    "2B": ((32, 2048, 16, 32), ((1, 2, 4, 4, 4), 32, 1), "1M", 8_818_788_608, (115.42, 9.85)),
    "8B": ((40, 3584, 28, 56), ((1, 2, 4, 4), 14, 2), "1M", 33_504_328_512, (382.33, 9.89)),
    "8B at 512": ((40, 3584, 28, 56), ((1, 2, 4, 4), 14, 2), "0.25M", 33_504_328_512, (77.58, 2.47)),
    "125M": ((12, 768, 8, 16), ((1, 2, 4, 4, 4), 16, 1), "0.06M", 500_672_000, (0.23, 0.62)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_and_costs_of_the_published_shapes(name: str) -> None:
    (depth, width, heads, bits), (mult, channels, patch), size, stored, teraflops = SHAPES[name]
    maps = published(size).maps
    own = {"depth": depth, "width": width, "heads": heads, "hidden": 4 * width, "bits": bits}
    config = InfinityConfig(**own, text_width=2048, text_length=512, pool_heads=16, maps=maps)
    assert sum(4 * tensor.numel() for tensor in empty_backbone(config).state_dict().values()) == stored
    tokenizer = BSQConfig(ch=128, ch_mult=mult, res_blocks=2, z_channels=channels, patch=patch, maps=maps)
    report = count_flops(config, tokenizer)
    found = report.dense.transformer.flops, report.dense.components["vqvae_decoder"].flops
    assert tuple(round(value / 1e12, 2) for value in found) == teraflops
    assert tokenizer.bits == config.bits


def test_schedules_of_the_tokenizer_are_maps_or_names(model: Model) -> None:
    maps = [list(each) for each in model.schedule.maps]
    bits = model.generate_tokens(prompts(model, 3), seed=1)
    assert torch.equal(model.tokenizer.decode(bits, maps), model.tokenizer.decode(bits, model.schedule))
    image = torch.zeros(1, 3, *model.tokenizer.image_size(published("0.06M")))
    assert model.tokenizer.encode(image, "0.06M").shape == (1, 521, 16)
    with pytest.raises(InputError, match=r"bits of \[121, 16\]; a pyramid of this schedule has \[521, 16\]"):
        model.tokenizer.decode(bits, "0.06M")


def test_no_step_reads_a_value_back() -> None:
    model, rows = square_model(), None
    rows = prompts(model, 3, 5)
    steps(model, rows)  # masks and tables are made in the first pass, as before a recording
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        without_values(model)
        steps(model, rows._of(torch.empty(rows.values.shape), rows.lengths, rows.silent))


def steps(model: Model, rows: av.TextRows) -> None:
    """Every step of a generation."""
    under_way = Generation(model, rows, Sampling(3.0, top_k=9, top_p=0.9, tau=0.5))
    for scale, length in enumerate(model.schedule.lengths):
        drawn = under_way.step(scale, torch.empty(len(rows), length, 16, 2).fill_(1))
        assert drawn.shape == (len(rows), length, 16)


def test_no_prompts_make_no_images(model: Model) -> None:
    nothing = av.TextRows(torch.zeros(0, 48), [])
    assert model.generate(nothing).shape == (0, 3, 32, 32) and model.generate_tokens([]).shape == (0, 121, 16)


def test_no_mask_of_all_pairs_is_made(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "mask", lambda self, device: pytest.fail("a scale attends to the keys up to its own end"))
    rows = prompts(model, 3, 5)
    bits = model.generate_tokens(rows)
    assert model.transformer(rows, model.teacher_forcing_input(bits)).shape == (2, 121, 32)
