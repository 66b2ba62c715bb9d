"""The rivals: nothing saved means the dense model, generation agrees with teacher forcing, FLOPs are those of a hand
count, and a cut is what it says.

The tiny model: 2 blocks, C 64, H 128, maps of 1, 4, 9 and 16 tokens, V 32, z 8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from rivals import METHODS
from rivals.clusterings import by_chance, by_weights
from rivals.control import Control
from rivals.converted import clustered
from rivals.early_exit import EarlyExit, depth_choices, exiting
from rivals.method import OutOfReach, first_late_scale, saved, token_plan
from rivals.small_model import DraftedTransformer, SmallModel, narrowed
from rivals.token_merging import MergingBlock, TokenMerging, match_tokens, merging, targets
from rivals.token_skipping import skipping
from torch import nn

import actvar_convert as av
from actvar_convert.conversion.clustering import Clustering, kmeans
from actvar_convert.cost import macs as costs
from actvar_convert.measure.image_features import model_fingerprint
from actvar_convert.models.base import Call, Span
from actvar_convert.models.model import Model
from actvar_convert.models.split import ffn_of, gated_blocks
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.labels import Labels
from actvar_convert.models.var.network import VARBlock, VARTransformer
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import SilentProgress

LABELS = [0, 3, 5, 1]
LENGTHS = (1, 4, 9, 16)
Maker = Callable[[Model], Model]


def late_plan(teacher: Model, share: float, spared: int) -> SparsityPlan:
    return token_plan(teacher.config, 2, share, spared=spared)


def control(teacher: Model) -> Model:
    recipe = Recipe(name="none", model="tiny")
    return Control().build(teacher, recipe, 0.0, SilentProgress(), None).model


def drafted(teacher: Model, width: int) -> Model:
    """A small model of another width with random weights, or of the teacher's with its weights."""
    config = narrowed(teacher.config, width)
    small = VARTransformer(config)
    if width == teacher.config.width:
        small.load_state_dict(teacher.transformer.state_dict())
    else:
        small.initialise(torch.Generator().manual_seed(0))
        for parameter in small.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return Model(DraftedTransformer(teacher.transformer, small, 2), teacher.tokenizer, teacher.sampling).eval()


UNCUT: dict[str, Maker] = {
    "token-skipping": lambda teacher: skipping(teacher, late_plan(teacher, 1.0, 1)),
    "token-merging": lambda teacher: merging(teacher, late_plan(teacher, 1.0, 0)),
    "early-exit": lambda teacher: exiting(teacher, (2, 2, 2, 2)),
    "small-model": lambda teacher: drafted(teacher, 64),
    "control": control,
}
CUT: dict[str, Maker] = {
    "token-skipping": lambda teacher: skipping(teacher, late_plan(teacher, 0.5, 1)),
    "token-merging": lambda teacher: merging(teacher, late_plan(teacher, 0.5, 0)),
    "early-exit": lambda teacher: exiting(teacher, (2, 2, 1, 1)),
    "small-model": lambda teacher: drafted(teacher, 32),
}


def generated(model: Model, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, L] and the logits [2 B, L, V] from which generation drew them."""
    seen: list[torch.Tensor] = []
    original = model.transformer.logits

    def logits(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        seen.append(original(x, head))
        return seen[-1].clone()

    with monkeypatch.context() as patch:
        patch.setattr(model.transformer, "logits", logits)
        tokens = model.generate_tokens(LABELS, seed=4)
    return tokens, torch.cat(seen, dim=1)


@torch.no_grad()
def forced(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Teacher-forcing logits [2 B, L, V] with the classes and without."""
    labels = torch.tensor(LABELS)
    inputs = model.teacher_forcing_input(tokens)
    null = torch.full_like(labels, model.config.classes)
    return model.transformer(torch.cat((labels, null)), inputs.repeat(2, 1, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", UNCUT)
def test_nothing_saved_is_the_dense_model(tiny_model: Model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = UNCUT[name](tiny_model)
    tokens, logits = generated(tiny_model, monkeypatch)
    torch.testing.assert_close(forced(rival, tokens), forced(tiny_model, tokens), rtol=0, atol=1e-4)
    same, own = generated(rival, monkeypatch)
    assert torch.equal(same, tokens)
    torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CUT)
def test_generation_agrees_with_teacher_forcing(tiny_model: Model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = CUT[name](tiny_model)
    tokens, logits = generated(rival, monkeypatch)
    torch.testing.assert_close(forced(rival, tokens), logits, rtol=0, atol=1e-4)
    late = slice(5, None)
    dense = forced(tiny_model, tokens)
    torch.testing.assert_close(logits[:, :5], dense[:, :5], rtol=0, atol=1e-4)
    assert float((logits[:, late] - dense[:, late]).abs().mean()) > 1e-3
    assert rival.generate(LABELS, seed=4).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("clustering", [by_chance, by_weights])
def test_clusterings_are_balanced_and_repeatable(clustering: Clustering) -> None:
    random = np.random.default_rng(0)
    activations, weights = random.standard_normal((50, 24)), random.standard_normal((24, 8))
    label = clustering(activations, weights, 6, seed=3)
    assert np.bincount(label, minlength=6).tolist() == [4] * 6
    assert (clustering(activations, weights, 6, seed=3) == label).all()


def test_a_conversion_with_the_recipes_own_clustering_is_that_of_the_library(
    tiny_model: Model, tiny_recipe: Recipe
) -> None:
    recipe, progress = METHODS["routed"].recipe(tiny_recipe, 0.2, tiny_model.config), SilentProgress()
    expected = av.convert(tiny_model, recipe=recipe)
    own, chance = (clustered(tiny_model, recipe, method, progress) for method in (kmeans, by_chance))
    assert own.plans == expected.plans
    tensors = expected.transformer.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in own.transformer.state_dict().items())
    first, other = (ffn_of(model.transformer.blocks[0]).permutation for model in (expected, chance))
    assert not torch.equal(first, other) and torch.equal(first.sort().values, other.sort().values)


def test_settings_are_a_part_of_the_fingerprint(tiny_model: Model) -> None:
    models = [exiting(tiny_model, (2, 2, 2, 1)), exiting(tiny_model, (2, 2, 1, 1)), control(tiny_model)]
    assert len({model_fingerprint(each) for each in models}) == 3


def context_of(model: Model, block: nn.Module, label: int) -> torch.Tensor:
    """A block's modulation [1, 6, C] by one class."""
    assert isinstance(block, VARBlock)
    return block.context(model.transformer.prepare(Labels.of(torch.tensor([label]), model.config.classes)))


def dense_row(scale: int, context: int | None = None, tokens: int | None = None) -> int:
    """MACs of one block at one scale for one row: 4 C^2 + 2 T C + 2 C H per token."""
    kept = LENGTHS[scale] if tokens is None else tokens
    T = sum(LENGTHS[: scale + 1]) if context is None else context
    return kept * (4 * 64 * 64 + 2 * T * 64 + 2 * 64 * 128)


HEAD = 30 * 64 * 32
ADALN = 2 * 6 * 64 * 64 + 2 * 64 * 64
WORDS = 29 * 8 * 64
DENSE = 2 * (sum(2 * dense_row(scale) for scale in range(4)) + HEAD + ADALN) + WORDS


def test_the_dense_hand_count(tiny_model: Model) -> None:
    assert costs.transformer_macs(tiny_model.config, None) == DENSE


def test_flops_of_token_skipping(tiny_model: Model) -> None:
    config = tiny_model.config
    plan = token_plan(config, 3, 0.5, spared=1)
    block = dense_row(3, context=1 + 4 + 9 + 8, tokens=8) + 16 * 64  # and the distance to the mean of 16 tokens
    assert costs.transformer_macs(config, plan) == DENSE - 2 * (dense_row(3) - block)


def test_flops_of_token_merging(tiny_model: Model) -> None:
    config = tiny_model.config
    plan = token_plan(config, 3, 0.5, spared=0)
    block = dense_row(3, context=1 + 4 + 9 + 8, tokens=8) + 4 * 12 * 64  # 4 targets, 12 others
    assert TokenMerging().macs(config, plan) == DENSE - 2 * 2 * (dense_row(3) - block)


def test_flops_of_early_exit(tiny_model: Model) -> None:
    macs = EarlyExit().macs(tiny_model.config, (2, 2, 2, 1))
    assert macs == DENSE - 2 * dense_row(3)


def test_flops_of_the_small_model(tiny_model: Model) -> None:
    config = tiny_model.config
    large = 2 * (2 * (dense_row(0) + dense_row(1)) + 5 * 64 * 32 + ADALN) + 4 * 8 * 64
    blocks = 0
    for length, context in zip(LENGTHS, (1, 5, 14, 30), strict=True):
        blocks += 2 * length * (4 * 32 * 32 + 2 * context * 32 + 2 * 32 * 64)
    small = 2 * (blocks + 25 * 32 * 32 + 2 * 6 * 32 * 32 + 2 * 32 * 32) + 29 * 8 * 32
    assert SmallModel().macs(config, narrowed(config, 32), 2) == large + small


def test_flops_of_nothing_saved(tiny_model: Model) -> None:
    config = tiny_model.config
    assert TokenMerging().macs(config, token_plan(config, 2, 1.0, spared=0)) == DENSE
    assert EarlyExit().macs(config, (2, 2, 2, 2)) == DENSE
    assert costs.transformer_macs(config, token_plan(config, 2, 1.0, spared=1)) == DENSE


@pytest.mark.parametrize("cut", [0.1, 0.25])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.fixed_cut is None])
def test_a_cut_is_reached_and_hardly_passed(tiny_model: Model, tiny_recipe: Recipe, name: str, cut: float) -> None:
    method, config = METHODS[name], tiny_model.config
    if method.calibrated and cut > 0.1:
        return  # plans of conversions have tests of their own
    if cut < method.least:
        with pytest.raises(OutOfReach, match=f"{name}: .* at least"):
            method.build(tiny_model, method.recipe(tiny_recipe, cut, config), cut, SilentProgress(), None)
        cut = method.least
    built = method.build(tiny_model, method.recipe(tiny_recipe, cut, config), cut, SilentProgress(), None)
    reached = saved(config, built.macs)
    step = 0.22 if name == "early-exit" else 0.1
    assert cut <= reached < cut + step


def test_a_cut_out_of_reach_is_said(tiny_model: Model, tiny_recipe: Recipe) -> None:
    config = tiny_model.config
    for name, method in METHODS.items():
        if method.fixed_cut is None:
            recipe = method.recipe(tiny_recipe, 0.97, config)
            with pytest.raises(OutOfReach, match=rf"{name}: [\s\S]*out of reach"):
                method.build(tiny_model, recipe, 0.97, SilentProgress(), None)


def test_where_late_scales_begin(tiny_model: Model) -> None:
    assert first_late_scale(tiny_model.config) == 2
    fashion = TransformerConfig(
        depth=1, width=8, heads=1, hidden=8, sides=(1, 2, 3, 4, 6, 8), vocab=2, z_channels=1, classes=1
    )
    assert first_late_scale(fashion) == 4


def test_finer_scales_leave_no_later(tiny_model: Model) -> None:
    config = TransformerConfig(**{**tiny_model.config.model_dump(), "depth": 4})
    expected = [(4, 4, low + more, low) for low in (1, 2, 3, 4) for more in (2, 1, 0) if low + more <= 4]
    assert depth_choices(config, 2) == expected
    gentle, hard = EarlyExit().depths(config, 0.05), EarlyExit().depths(config, 0.5)
    assert gentle == (4, 4, 4, 3)
    assert EarlyExit().macs(config, hard) < EarlyExit().macs(config, gentle)


@pytest.mark.parametrize(("side", "count"), [(4, 16), (4, 9), (4, 4), (3, 4), (3, 7)])
def test_merging_loses_no_token(side: int, count: int) -> None:
    x = torch.randn(2, side * side, 8, generator=torch.Generator().manual_seed(side))
    found = match_tokens(x, side, count)
    assert found.size.shape == (2, count) and found.size.sum(1).tolist() == [side * side] * 2
    merged = found.merge(x)
    for row in range(2):
        for group in range(count):
            members = found.group[row] == group
            torch.testing.assert_close(merged[row, group], x[row, members].mean(0))
            assert bool((found.unmerge(merged)[row, members] == merged[row, group]).all())


def test_the_most_similar_tokens_merge() -> None:
    x = torch.eye(16).unsqueeze(0)
    x[0, 5] = 2 * x[0, 10]  # a copy of a target, 10, in another length
    found = match_tokens(x, 4, 15)
    assert targets(4) == 4 and found.group[0, 5] == found.group[0, 10]
    assert sorted(found.size[0].tolist()) == [1.0] * 14 + [2.0]


@torch.no_grad()
def test_equal_tokens_merge_without_loss(tiny_model: Model) -> None:
    """A map of four different tokens, each four times: the block on four merged tokens is the block on all sixteen."""
    config = tiny_model.config
    plan = token_plan(config, 3, 0.25, spared=0)
    dense = tiny_model.transformer.blocks[0]
    assert isinstance(dense, VARBlock)
    block = MergingBlock(dense, plan.blocks[0], config.sides)
    four = torch.randn(1, 2, 2, 64, generator=torch.Generator().manual_seed(0))
    x = four.repeat_interleave(2, 1).repeat_interleave(2, 2).view(1, 16, 64)
    context, call = context_of(tiny_model, dense, 2), Call(Span(3, (16,)))
    torch.testing.assert_close(block(x, context, call), dense(x.clone(), context, call), rtol=1e-4, atol=1e-5)


def test_a_skipped_token_gets_the_previous_update(tiny_model: Model) -> None:
    """With no token kept a block repeats what it did at the scale before, resized."""
    rival = skipping(tiny_model, late_plan(tiny_model, 0.0, 1))
    (block,) = gated_blocks(rival.transformer)
    assert block.index == 1 and bool((block.reconstruction.alpha == 1).all())
    plan = rival.plan
    assert plan.blocks[1].keep == (1.0, 1.0, 0.0, 0.0) and plan.reconstruction_rank == 0
    x = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        added = block(x, context_of(rival, block.block, 0), Call(Span(0, LENGTHS))) - x
    before = added[:, 1:5].transpose(1, 2).reshape(1, 64, 2, 2)
    expected = torch.nn.functional.interpolate(before, size=(3, 3), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(added[:, 5:14], expected, rtol=1e-4, atol=1e-5)
