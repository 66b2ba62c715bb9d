"""The seam is real: a family that the library has no line of is converted, distilled, sampled, priced and stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import actvar_convert as av
from actvar_convert.cost.macs import transformer_macs
from actvar_convert.models.base import Entries, Sampling, inner
from actvar_convert.models.families import FAMILIES
from actvar_convert.models.gate import GatedBlock
from actvar_convert.models.model import Model
from actvar_convert.models.split import expert_ffns, gated_blocks
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe

from .second_family import Shape, Writing

SHAPES = {"oblong maps": Shape(), "a 1-D pyramid": Shape(maps=((1, 1), (3, 1), (7, 1), (16, 1)))}


def writing_model(shape: Shape | None = None) -> Model:
    """A small dense model of this family with random weights."""
    shape, family = shape or Shape(), Writing()
    torch.manual_seed(0)
    model = Model(family.backbone(shape), family.tokenizer(shape), Sampling(cfg=2.0))
    for parameter in model.transformer.parameters():
        parameter.data.mul_(2)  # so that what is left out can be told
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the table."""
    monkeypatch.setitem(FAMILIES, "writing", Writing())


@pytest.fixture(params=SHAPES)
def dense(request: pytest.FixtureRequest) -> Model:
    return writing_model(SHAPES[request.param])


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "writing",
        "model": "writing",
        "device": "cpu",
        "calibration": {"pyramids": 16, "batch": 8},
        "experts": {"count": 8},
        "gate": {"rank": 4},
        "budget": {"reduction": 0.2, "prefix_share": 0.5, "gate_keep": 0.4, "gate_scales": 2, "pyramids": 16},
        "data": {"pyramids": 256, "batch": 64},
        "distill": {
            "stage1": {"steps": 20, "batch": 16, "warmup": 2},
            "stage2": {"steps": 80, "batch": 32, "warmup": 5},
        },
    }
    return Recipe.model_validate(settings | changes)


def kl_to(dense: Model, other: Model) -> float:
    """Nats per token on pyramids that the dense model samples."""
    words = dense.family.balanced(dense.config, 40)
    tokens = dense.generate_tokens(words, seed=9).clone()
    with torch.no_grad():
        inputs = dense.teacher_forcing_input(tokens)
        logits = dense.transformer(words, inputs), other.transformer(words, inputs)
        return float(dense.alphabet.divergence(*logits).mean())


def test_it_is_converted_distilled_and_sampled(dense: Model, tmp_path: Path) -> None:
    chosen = recipe()
    sparse = av.convert(dense, recipe=chosen)
    assert sparse.plan.gated and any(any(block.routed) for block in sparse.plan.blocks)
    saved = 1 - transformer_macs(dense.config, sparse.plan) / transformer_macs(dense.config, None)
    assert 0.2 <= saved < 0.3
    before = kl_to(dense, sparse)
    trained = av.distill(sparse, teacher=dense, recipe=chosen, out=tmp_path / "out")
    assert kl_to(dense, trained) < 0.8 * before
    again = av.load(tmp_path / "out", device="cpu")
    images = trained.generate([0, 1, 2], seed=3)
    assert images.shape == (3, 3, *dense.config.maps[-1])
    torch.testing.assert_close(again.generate([0, 1, 2], seed=3), images)


def test_sequential_refitting_lowers_the_divergence(dense: Model) -> None:
    many = {"calibration": {"pyramids": 96, "batch": 32}}
    plain = av.convert(dense, recipe=recipe(**many))
    refitted = av.convert(dense, recipe=recipe(**many, experts={"count": 8, "compensation": "sequential"}))
    assert kl_to(dense, refitted) < kl_to(dense, plain)


def test_everything_on_is_the_dense_model(dense: Model) -> None:
    plans = {"all": SparsityPlan.dense(dense.config, 8)}
    same = av.convert(dense, recipe=recipe(plans=plans, gate={}))
    assert kl_to(dense, same) < 1e-6
    assert not list(gated_blocks(same.transformer)) and len(list(expert_ffns(same.transformer))) == dense.config.depth


def test_generation_equals_teacher_forcing(dense: Model) -> None:
    sparse = av.convert(dense, recipe=recipe())
    words = sparse.family.balanced(sparse.config, 2)
    tokens = sparse.generate_tokens(words, sampling=sparse.sampling_with(cfg=1.0, top_k=1), seed=0).clone()
    with torch.no_grad():
        logits = sparse.transformer(words, sparse.teacher_forcing_input(tokens))
    likeliest = logits.view(*tokens.shape, 2).argmax(-1)
    assert float((likeliest == tokens).double().mean()) > 0.99


@torch.no_grad()
def test_a_gated_block_is_the_dense_block_on_the_kept_rows(dense: Model) -> None:
    sparse = av.convert(dense, recipe=recipe())
    block = next(gated_blocks(sparse.transformer))
    words = sparse.family.balanced(sparse.config, 3)
    x, prepared, call = sparse.start(words, sparse.teacher_forcing_input(sparse.generate_tokens(words)))
    context = inner(block).context(prepared)
    rows = block.computed_rows(x, call.span)
    taken = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    expected = inner(block)(taken, context, call.of(rows, block.kept_counts(call.span)))
    got = block(x, context, call).gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    assert isinstance(block, GatedBlock) and float((got - expected).abs().max()) == 0.0


def test_its_condition_may_be_dropped_and_joined(dense: Model) -> None:
    words: Entries = dense.family.balanced(dense.config, 4)
    dropped = words.dropped(torch.tensor([True, False, False, True]))
    assert float(dropped.values[0].abs().sum()) == 0.0 and torch.equal(dropped.values[1], words.values[1])
    assert len(words.joined(words.null())) == 8


def test_the_report_prices_its_cross_attention(dense: Model) -> None:
    report = av.report_flops(av.convert(dense, recipe=recipe()))
    assert report.sparse is not None
    assert 0 < report.sparse.components["cross_attention"].macs < report.dense.components["cross_attention"].macs
