"""Recipes proved against the models that they name, without weights; and what the shipped ones say about themselves."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import actvar_convert as av
from actvar_convert.errors import RecipeError
from actvar_convert.files.layout import official_config
from actvar_convert.files.sparse_folder import save_sparse
from actvar_convert.models.model import Model
from actvar_convert.models.var.family import decoder_macs
from actvar_convert.recipe import load_recipe, shipped_recipes

PUBLISHED = ["var_d16", "var_d20", "var_d24", "var_d30", "var_d36"]
SMALL = ["experts.count=8", "gate.rank=4", "budget.reduction=0.1"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_needs_neither_file_nor_network(name: str) -> None:
    found = av.validate_recipe(name)
    depth = int(name.removeprefix("var_d"))
    assert found.model.startswith(f"VAR-d{depth}: {depth} blocks, width {64 * depth}, ")
    plan = found.plans[found.default_plan]
    assert 0.3 <= plan.reduction < 0.305
    assert plan.flops == pytest.approx((1 - plan.reduction) * found.dense_flops)
    recipe = load_recipe(name)
    config, _ = official_config(recipe.model)
    assert config.hidden // recipe.experts.count >= 256 and recipe.dtype == "bf16" and recipe.data.cfg == 1.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_figures_in_a_shipped_recipe_are_those_of_its_settings(name: str) -> None:
    """Recomputes every figure of the comment: FLOPs, memory, and the arithmetic of the hours."""
    found, recipe = av.validate_recipe(name), load_recipe(name)
    comment = "".join(line for line in shipped_recipes()[name].read_text().splitlines(True) if line.startswith("#"))
    plan = found.plans[found.default_plan]
    assert (
        f"dense {found.dense_flops / 1e9:,.1f} GFLOPs, sparse {plan.flops / 1e9:,.1f} GFLOPs, "
        f"{100 * plan.reduction:.1f} % saved" in comment
    )
    assert f"convert {found.convert_bytes / 1e9:.1f} GB" in comment
    assert f"distill {found.distill_bytes / 1e9:.1f} GB" in comment
    forward = found.dense_flops / 2
    assert f"F = {forward / 1e9:,.1f} GFLOPs" in comment
    stages = []
    for stage, factor in ((recipe.distill.stage1, 3), (recipe.distill.stage2, 4)):
        stages.append(stage.steps * stage.batch * factor * forward)
        line = f"{stage.steps:,} steps x {stage.batch} pyramids x {factor} F = {stages[-1] / 1e15:,.0f} PFLOP"
        assert line in comment
    decoder = 2 * 2 * sum(decoder_macs(official_config(recipe.model)[1]))
    images = recipe.evaluate.images * (found.dense_flops + plan.flops + decoder)
    assert f"{recipe.evaluate.images:,} images, dense and sparse, with decoder = {images / 1e15:,.0f} PFLOP" in comment
    samples = recipe.data.pyramids * 2 * forward
    assert f"{recipe.data.pyramids:,} pyramids x 2 F = {samples / 1e15:,.0f} PFLOP" in comment
    assert recipe.dtype == "bf16" and "an assumed 150 TFLOP/s in bf16" in comment
    hours = (sum(stages) + images + samples) / 150e12 / 3600
    assert f"about {hours:.1f} GPU hours" in comment and "Estimated time, not measured" in comment


def test_a_model_in_a_file_is_read_by_its_shapes(tmp_path: Path, tiny_model: Model) -> None:
    for name, part in {"var": tiny_model.transformer, "vae": tiny_model.tokenizer}.items():
        save_file({key: t.contiguous() for key, t in part.state_dict().items()}, tmp_path / f"{name}.safetensors")
    text = f"name: mine\nmodel: {tmp_path}/var.safetensors\n"
    (tmp_path / "mine.yaml").write_text(text)
    found = av.validate_recipe(tmp_path / "mine.yaml", SMALL)
    assert found.name == "mine" and found.model.startswith("VAR: 2 blocks, width 64")
    with pytest.raises(RecipeError) as raised:
        av.validate_recipe(tmp_path / "mine.yaml", ["experts.count=24", "seed=-1"])
    assert "a divisor of the 128 hidden neurons" in str(raised.value) and "seed: given -1" in str(raised.value)
    with pytest.raises(RecipeError, match=r"recipe 'mine': 1 problem\n  - budget.reduction: 0.900 is out of reach"):
        av.validate_recipe(tmp_path / "mine.yaml", [*SMALL, "budget.reduction=0.9"])
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(RecipeError, match="has no tokenizer in it or beside it; name its file under vae"):
        av.validate_recipe(tmp_path / "mine.yaml", SMALL)


def test_a_model_that_could_not_be_loaded_is_no_valid_one(tmp_path: Path, tiny_model: Model) -> None:
    tensors = {key: t.contiguous() for key, t in tiny_model.transformer.state_dict().items()}
    tokenizer = {key: t.contiguous() for key, t in tiny_model.tokenizer.state_dict().items()}
    save_file({**tensors, "rotary": torch.zeros(1)}, tmp_path / "var.safetensors")
    save_file({**tokenizer, "quantize.ema_vocab_hit_SV": torch.zeros(6, 32)}, tmp_path / "vae.safetensors")
    (tmp_path / "r.yaml").write_text(f"name: r\nmodel: {tmp_path}/var.safetensors\n")
    with pytest.raises(RecipeError, match="rotary is unknown; scales: transformer 4, tokenizer 6"):
        av.validate_recipe(tmp_path / "r.yaml", SMALL)
    with pytest.raises(RecipeError, match="brings its own tokenizer"):
        av.validate_recipe("fashion", ["vae=x.pth"])


def test_what_keeps_a_model_whole_is_said_where_it_is_to_be_split() -> None:
    settings = ["distill.plans=random"]
    assert av.validate_recipe("fashion", settings, processes=2).processes == 2
    with pytest.raises(RecipeError) as raised:
        av.validate_recipe("fashion", settings, processes=2, sharded=True)
    assert [problem.split(", allowed")[0] for problem in raised.value.problems] == [
        "distill.stage2.optimizer: given muon",
    ]


def test_what_a_recipe_names_beside_its_model_has_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("{}")
    settings = [
        "device=foo",
        f"evaluate.reference={tmp_path}/some.txt",
        f"checks.baseline={tmp_path}/no.json",
        f"data.images={tmp_path}/none",
    ]
    with pytest.raises(RecipeError, match="4 problems") as raised:
        av.validate_recipe("fashion", settings)
    for said, problem in zip(
        (
            "device: device 'foo' is unknown",
            f"evaluate.reference: {tmp_path}/some.txt: no folder of images",
            f"checks.baseline: {tmp_path}/no.json: cannot be read",
            f"data.images: {tmp_path}/none: no such folder",
        ),
        raised.value.problems,
        strict=True,
    ):
        assert problem.startswith(said)
    missing = f"evaluate.reference={tmp_path}/statistics.npz"
    with pytest.raises(RecipeError, match=r"statistics\.npz: no folder of images and no \.npz file"):
        av.validate_recipe("fashion", [missing])
    assert av.validate_recipe("fashion", ["device=cuda:7"]).name == "fashion", "another machine may have it"


def test_models_that_are_not_there_or_no_dense_var(tmp_path: Path, tiny_sparse: Model) -> None:
    sparse = save_sparse(tiny_sparse, tmp_path / "sparse", provenance={}, recipe_text="name: x\n")
    torch.save({"blocks.0.attn.mat_qkv.weight": torch.zeros(6, 2)}, tmp_path / "part.pth")
    for model, said in {
        "var-d17": "model: ",
        str(tmp_path / "nothing.pth"): "does not exist",
        str(sparse): "is no dense VAR: Sparse VAR",
        str(tmp_path / "part.pth"): "model: ",
    }.items():
        path = tmp_path / "r.yaml"
        path.write_text(f"name: r\nmodel: {model}\nexperts: {{count: 0}}\n")
        with pytest.raises(RecipeError, match=re.escape(said)) as raised:
            av.validate_recipe(path)
        assert "experts.count: given 0" in str(raised.value), "problems of the recipe itself are named too"
