"""Infinity goes through the method: converted, distilled, stored, sampled, priced, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import actvar_convert as av
from actvar_convert.cost.macs import transformer_macs
from actvar_convert.errors import InputError, RecipeError
from actvar_convert.files.infinity import own_names
from actvar_convert.models.base import inner
from actvar_convert.models.model import Model
from actvar_convert.models.split import gated_blocks
from actvar_convert.recipe.schema import Recipe
from actvar_convert.show.card import model_card
from actvar_convert.show.tables import Reports
from tests.infinity_model import prompts, square_model


@pytest.fixture(scope="module")
def dense() -> Model:
    model = square_model()
    return model.with_prompts(prompts(model, 3, 5, 8, 2))


def recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "captions",
        "model": "captions",
        "device": "cpu",
        "calibration": {"pyramids": 12, "batch": 6},
        "experts": {"count": 8},
        "gate": {"rank": 4},
        "budget": {"reduction": 0.2, "prefix_share": 0.5, "gate_keep": 0.4, "gate_scales": 2, "pyramids": 12},
        "data": {"pyramids": 96, "batch": 32},
        "distill": {
            "stage1": {"steps": 10, "batch": 12, "warmup": 2},
            "stage2": {"steps": 30, "batch": 12, "warmup": 4},
        },
    }
    return Recipe.model_validate(settings | changes)


def kl_to(dense: Model, other: Model) -> float:
    """Nats per token on pyramids that the dense model samples."""
    rows = dense.balanced(16)
    tokens = dense.generate_tokens(rows, seed=9)
    with torch.no_grad():
        inputs = dense.teacher_forcing_input(tokens)
        logits = dense.transformer(rows, inputs), other.transformer(rows, inputs)
        return float(dense.alphabet.divergence(*logits).mean())


def test_it_is_converted_distilled_stored_and_exported(dense: Model, tmp_path: Path) -> None:
    chosen = recipe()
    prompts(dense, 3, 5, 8, 2).save(tmp_path / "rows.safetensors")
    sparse = av.convert(square_model(), recipe=recipe(data={"rows": str(tmp_path / "rows.safetensors")}))
    assert sparse.plan.gated and any(any(block.routed) for block in sparse.plan.blocks)
    saved = 1 - transformer_macs(dense.config, sparse.plan) / transformer_macs(dense.config, None)
    assert 0.2 <= saved < 0.3
    before = kl_to(dense, sparse)
    av.export(sparse, out=tmp_path / "back.safetensors")
    source = dense.transformer.state_dict()
    for name, tensor in own_names(load_file(tmp_path / "back.safetensors")).items():
        assert torch.equal(tensor, source[name]), name
    trained = av.distill(sparse, teacher=dense, recipe=chosen, out=tmp_path / "out")
    assert kl_to(dense, trained) < 0.9 * before
    again, rows = av.load(tmp_path / "out", device="cpu"), prompts(dense, 3, 5)
    images = trained.generate(rows, seed=3, negative=prompts(dense, 2))
    assert images.shape == (2, 3, 32, 32) and again.sampling == dense.sampling
    torch.testing.assert_close(again.generate(rows, seed=3, negative=prompts(dense, 2)), images)
    found = av.inspect(tmp_path / "out")
    assert found.complete and found.kind == "sparse" and "Infinity" in found.line
    report = av.report_flops(again)
    assert report.sparse is not None
    assert report.sparse.components["cross_attention"].macs < report.dense.components["cross_attention"].macs


def test_folded_guidance_takes_one_row(dense: Model) -> None:
    plain = recipe()
    folded = recipe(budget={**plain.budget.model_dump(exclude_unset=True), "guidance": "folded"})
    sparse = av.convert(dense, recipe=folded)
    assert sparse.folded and sparse.guidance().rows == 1
    assert sparse.generate(prompts(dense, 3), seed=1).shape == (1, 3, 32, 32)


@torch.no_grad()
def test_a_gated_block_is_the_dense_block_on_the_kept_rows(dense: Model) -> None:
    sparse = av.convert(dense, recipe=recipe())
    block = next(gated_blocks(sparse.transformer))
    rows = prompts(dense, 3, 5)
    x, prepared, call = sparse.start(rows, sparse.teacher_forcing_input(sparse.generate_tokens(rows)))
    context, own = inner(block).context(prepared), inner(block)
    kept = block.computed_rows(x, call.span)
    index = kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    expected = own(x.gather(1, index), context, call.of(kept, block.kept_counts(call.span)))
    torch.testing.assert_close(block(x, context, call).gather(1, index), expected)


def test_a_sparse_model_keeps_its_maps(dense: Model) -> None:
    sparse = av.convert(dense, recipe=recipe())
    with pytest.raises(InputError, match="runs the token maps that its plan was made for"):
        sparse.generate(prompts(dense, 3), schedule="0.06M")


def test_quality_and_seconds_are_measured(dense: Model) -> None:
    sparse = av.convert(dense, recipe=recipe())
    report = av.evaluate(sparse, teacher=dense, settings=av.Evaluation(images=0, held_out=4, batch=4))
    assert report.kl.mean > 0 and report.sampling.tau == 0.8
    few = av.Evaluation(images=0, held_out=4)
    again = av.evaluate(sparse, teacher=square_model(), rows=dense.prompts, settings=few)
    assert again.kl.pyramids == 4
    timed = av.benchmark(sparse, against=dense, timing=av.Timing(batches=(1,), repeats=1, with_decoder=(False,)))
    assert timed.rows[0].dense_ms is not None
    with pytest.raises(InputError, match="rows: none given, and infinity makes images of text"):
        av.evaluate(sparse, teacher=square_model(), settings=few)


def test_a_recipe_without_prompts_or_with_classes_is_refused(dense: Model, tiny_model: Model, tmp_path: Path) -> None:
    bare = square_model()
    for name in ("fashion", "var_d16"):
        with pytest.raises(RecipeError, match=r"data\.rows: not given, and infinity makes images of text"):
            av.convert(bare, recipe=name)
    rows = tmp_path / "rows.safetensors"
    av.TextRows(torch.zeros(3, 7), [3]).save(rows)
    with pytest.raises(RecipeError, match=r"data\.rows: text rows have 7 channels, the model reads 48"):
        av.convert(bare, recipe=recipe(data={"rows": str(rows)}))
    with pytest.raises(RecipeError, match=r"data\.images: given, and the model makes images of text"):
        av.convert(dense, recipe=recipe(data={"images": str(tmp_path)}))
    with pytest.raises(RecipeError, match=r"data\.rows: given, and the model makes no images of text"):
        av.convert(tiny_model, recipe=recipe(data={"rows": str(rows)}, experts={"count": 4}))


def test_pictures_of_prompts(dense: Model, tmp_path: Path) -> None:
    rows = tmp_path / "rows.safetensors"
    prompts(dense, 3, 5).save(rows)
    images = av.sample(square_model(), rows=rows, per_class=2, out=tmp_path / "x.png", tau=0.5)
    assert images.shape == (4, 3, 32, 32) and (tmp_path / "x.png").stat().st_size > 100
    with pytest.raises(InputError, match="rows: none given"):
        av.sample(square_model())
    with pytest.raises(InputError, match="knows no classes"):
        av.sample(square_model(), rows=rows, labels=[1])


def test_the_card_of_a_model_of_text_shows_how_prompts_are_given(dense: Model) -> None:
    report = av.report_flops(av.convert(dense, recipe=recipe()))
    card = model_card("captions", Reports(report))
    assert "text-to-image generator (Infinity)" in card and "actvar sample path/to/this/folder --rows" in card
    assert report.dense.per_scale[-1].columns is None and '"columns"' not in report.to_json()
    wide = av.report_flops(dense.at("0.06M@1.5"))
    assert (wide.dense.per_scale[-1].side, wide.dense.per_scale[-1].columns) == (21, 14)


def test_sequential_refitting_lowers_the_divergence() -> None:
    model = square_model()
    for block in model.transformer.blocks:
        block.ada_gss[:, :, :2] += 0.5  # gates that differ little between prompts, as those of a trained model
    model.transformer.shared_ada_lin[1].weight.mul_(0.3)
    model = model.with_prompts(prompts(model, *[5] * 64))
    many = {"calibration": {"pyramids": 96, "batch": 32}}
    plain = av.convert(model, recipe=recipe(**many))
    refitted = av.convert(model, recipe=recipe(**many, experts={"count": 8, "compensation": "sequential"}))
    assert kl_to(model, refitted) < 0.8 * kl_to(model, plain)
