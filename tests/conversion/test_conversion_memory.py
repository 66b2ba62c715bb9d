"""The estimate of a conversion against what it takes, and the refusal before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actvar_convert.conversion import conversion_memory as memory
from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.conversion.conversion_memory import MemoryEstimate, estimate_convert, require_memory
from actvar_convert.conversion.converter import convert_model
from actvar_convert.conversion.search import Planned, plan_model
from actvar_convert.errors import InputError
from actvar_convert.files.layout import official_config
from actvar_convert.models.model import GENERATION_BYTES, Model, images_at_once
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import BudgetRecipe, CalibrationRecipe, ExpertsRecipe, Recipe

from ..conftest import calibration_of, convert_with

SIDES = (1, 2, 3, 4, 6, 8)


def model(width: int, depth: int, vocab: int = 256) -> Model:
    config = TransformerConfig(
        depth=depth, width=width, heads=4, hidden=4 * width, sides=SIDES, vocab=vocab, z_channels=8, classes=10
    )
    tokenizer = TokenizerConfig(ch=32, ch_mult=(1,), res_blocks=1, vocab=vocab, z_channels=8, sides=SIDES)
    return Model(VARTransformer(config), VQVAE(tokenizer)).eval().requires_grad_(False)


def recipe(pyramids: int, batch: int, **calibration: Any) -> Recipe:
    return Recipe(
        name="x",
        model="x",
        calibration=CalibrationRecipe(pyramids=pyramids, batch=batch, **calibration),
        experts=ExpertsRecipe(count=8),
        budget=BudgetRecipe(reduction=0.2, gate_keep=0.8),
    )


@pytest.mark.parametrize(
    ("phase", "width", "depth", "pyramids", "batch"),
    [
        ("converting", 64, 3, 32, 4),
        ("converting", 128, 2, 64, 16),
        ("refitting", 128, 3, 64, 32),
        ("refitting", 128, 2, 64, 32),
    ],
)
def test_converting_takes_what_was_estimated(
    memory_watch: Any, phase: str, width: int, depth: int, pyramids: int, batch: int
) -> None:
    dense, chosen = model(width, depth), recipe(pyramids, batch)
    if phase == "refitting":
        chosen = chosen.model_copy(update={"experts": ExpertsRecipe(count=8, compensation="sequential")})
    config = dense.config
    chosen = chosen.model_copy(update={"plans": recipe_plans(config, chosen)[0]})
    estimate = estimate_convert(config, dense.tokenizer.config, chosen, keep=True)
    assert estimate.phase == phase
    tokens = torch.randint(0, config.vocab, (pyramids, config.schedule.total))
    with memory_watch:
        convert_with(dense, *recipe_plans(config, chosen), chosen, tokens, torch.arange(pyramids) % 10)
    expected = estimate.total - memory.PROGRAM - estimate.parts["dense weights"]
    assert 0.5 * expected < memory_watch.peak < expected


def test_a_model_that_is_given_up_makes_room_for_the_result() -> None:
    """What stays of both together is one copy of the weights, and a dense model is left without blocks."""
    dense, chosen = model(128, 6), recipe(8, 4)
    config = dense.config
    plans, default = recipe_plans(config, chosen)
    kept, given_up = (
        estimate_convert(config, dense.tokenizer.config, chosen.model_copy(update={"plans": plans}), keep=keep)
        for keep in (True, False)
    )
    assert kept.total - given_up.total > 0.7 * kept.parts["dense weights"]
    tokens = torch.randint(0, config.vocab, (8, config.schedule.total))
    calibration = calibration_of(dense, tokens, torch.arange(8) % 10, 4)
    sizes = {}
    for keep in (True, False):
        before = sum(tensor.nbytes for tensor in dense.transformer.state_dict().values() if not tensor.is_meta)
        sparse = convert_model(dense, Planned(plans, default, None, {}), chosen, calibration, keep=keep)
        both = (*dense.transformer.state_dict().values(), *sparse.transformer.state_dict().values())
        memories = {tensor.data_ptr(): tensor.nbytes for tensor in both if not tensor.is_meta}
        sizes[keep] = sum(memories.values()) / before
        logits = sparse.transformer.head.weight.sum()
        assert logits.isfinite() and not any(tensor.is_meta for tensor in sparse.state_dict().values())
    assert sizes[True] > 1.9 and sizes[False] < 1.2
    assert all(tensor.is_meta for block in dense.transformer.blocks for tensor in block.parameters())


@pytest.mark.parametrize(("width", "depth", "pyramids", "batch"), [(64, 3, 32, 16), (128, 2, 16, 16)])
def test_searching_takes_what_was_estimated(
    memory_watch: Any, width: int, depth: int, pyramids: int, batch: int
) -> None:
    dense, chosen = model(width, depth), recipe(pyramids, batch)
    config = dense.config
    estimate = estimate_convert(config, dense.tokenizer.config, chosen)
    assert estimate.phase == "searching"
    tokens = torch.randint(0, config.vocab, (pyramids, config.schedule.total))
    with memory_watch:
        plan_model(dense, chosen, calibration_of(dense, tokens, torch.arange(pyramids) % 10, batch))
    expected = estimate.total - memory.PROGRAM - estimate.parts["dense weights"]
    assert 0.4 * expected < memory_watch.peak < expected


@pytest.mark.parametrize("at_once", [8, 2])
def test_sampling_takes_what_was_estimated(memory_watch: Any, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    dense = model(64, 2, vocab=1024)
    monkeypatch.setitem(GENERATION_BYTES, "cpu", GENERATION_BYTES["cpu"] * at_once // dense.images_at_once())
    assert dense.images_at_once() == at_once
    parts = memory.sampling_memory(dense.config, dense.tokenizer.config, 8, 4)
    assert bool(parts["random numbers"]) == (at_once < 8)
    with memory_watch:
        dense.generate_tokens(range(8), chunk=8, sampling=dense.sampling_with(top_k=900, top_p=0.96))
    assert 0.5 * sum(parts.values()) < memory_watch.peak < sum(parts.values())


def test_published_sizes_with_their_own_recipes() -> None:
    """d16 with 64 pyramids takes about twice its fp32 file, d30 under 14 GiB; large batches cost most in a block."""
    totals = {}
    for depth in (16, 30):
        chosen = load_recipe(f"var_d{depth}", ["calibration.pyramids=64"])
        config, tokenizer = official_config(f"var-d{depth}")
        totals[depth] = estimate_convert(config, tokenizer, chosen).total
        with torch.device("meta"):
            file = 4 * sum(tensor.numel() for tensor in VARTransformer(config).state_dict().values())
        assert file < totals[depth]
        if depth == 16:  # of which half a copy for sampling in half precision, and 0.45 GB for the program
            assert totals[depth] < 2.1 * file
    assert totals[30] < 14 * 2**30
    config, tokenizer = official_config("var-d16")
    large = estimate_convert(config, tokenizer, load_recipe("var_d16", ["calibration.batch=64"]))
    assert large.phase == "converting" and large.lower[0] == "calibration.batch"
    assert large.parts["one block at work"] == 64 * 680 * (2 * 4096 + 8 * 1024) * 4


def test_sampling_in_half_precision_takes_a_copy_and_halves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer = official_config("var-d16")
    monkeypatch.setattr(memory, "fullest", lambda *phases: next(each for each in phases if each.phase == "sampling"))
    full, half = (
        estimate_convert(config, tokenizer, load_recipe("var_d16", [f"dtype={dtype}"])) for dtype in ("fp32", "bf16")
    )
    assert half.parts["keys and values"] == full.parts["keys and values"] // 2
    assert half.parts["weights in half precision"] == full.parts["dense weights"] // 2
    assert half.parts["dense weights"] == full.parts["dense weights"]
    assert full.parts["weights in half precision"] == 0


def test_a_large_batch_is_sampled_in_pieces() -> None:
    config, tokenizer = official_config("var-d16")
    cpu, gpu = (memory.sampling_memory(config, tokenizer, 64, 4, device) for device in ("cpu", "cuda"))
    under_way = images_at_once(config, tokenizer, 4, "cpu")
    on_gpu = min(64, images_at_once(config, tokenizer, 4, "cuda"))
    assert 1 < under_way < on_gpu
    assert cpu["keys and values"] == 2 * 16 * 2 * under_way * 680 * 1024 * 4
    assert gpu["keys and values"] == 2 * 16 * 2 * on_gpu * 680 * 1024 * 4
    assert cpu["random numbers"] == 4 * 64 * 680 * 4096
    assert gpu["random numbers"] == (cpu["random numbers"] if on_gpu < 64 else 0)


@pytest.mark.parametrize("settings", [(), ("experts.compensation=sequential",)])
def test_a_model_that_is_kept_counts_beside_its_result(settings: tuple[str, ...]) -> None:
    config, tokenizer = official_config("var-d16")
    chosen = load_recipe("var_d16", ["dtype=fp32", *settings])
    given_up, kept = (estimate_convert(config, tokenizer, chosen, keep=keep) for keep in (False, True))
    assert (kept == given_up) == bool(settings), "refitting needs both models"
    assert kept.total - given_up.total == kept.parts["dense weights"] - given_up.parts["dense weights"]


def test_images_need_feature_maps_instead_of_samples() -> None:
    config, tokenizer = official_config("var-d16")
    chosen = load_recipe("var_d16", ["calibration={pyramids: 64, batch: 64}", "data.images=x"])
    estimate = estimate_convert(config, tokenizer, chosen)
    assert estimate.parts["feature maps of the tokenizer"] == 6 * 4 * 64 * 160 * 256**2


def test_too_little_memory_is_said_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = MemoryEstimate("convert", "sampling", {"a": 3 * 10**9, "b": 10**9, "c": 0}, ("x.batch", "x.pyramids"))
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 4 * 10**9)
    require_memory(estimate)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 4 * 10**9 - 1)
    with pytest.raises(InputError) as raised:
        require_memory(estimate)
    for said in ("needs about 4.0 GB", "4.0 GB are free", "Lower x.batch or x.pyramids", "a: 3.0 GB", "b: 1.0 GB"):
        assert said in str(raised.value)
    assert "c:" not in str(raised.value)
    with pytest.raises(InputError, match=r"4\.0 GB are free\. Use a larger machine"):
        require_memory(estimate._replace(lower=()))
