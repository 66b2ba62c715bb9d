"""What a file leaves open: a person chooses, or what was taken is said on every load."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import actvar_convert as av
from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files.dense import load_dense
from actvar_convert.files.layout import split_parts
from actvar_convert.files.source import load_any
from actvar_convert.files.sparse_folder import read_provenance, save_sparse
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig
from actvar_convert.models.var.family import decoder_macs
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.origins import Run, recorded_teacher
from actvar_convert.recipe import Recipe
from actvar_convert_cli.main import app

Parts = tuple[dict[str, Tensor], dict[str, Tensor]]


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 0.5 if name == "head.bias" else tensor for name, tensor in tensors.items()}


def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("trained", "average", "names"),
    [
        ("model", "ema", ["ema", "EMA", "ema."]),
        ("model", "model_ema", ["ema", "model_ema"]),
        ("model", "ema_model", ["ema_model", "ema"]),
        ("state_dict", "ema_state_dict", ["ema", "ema_state_dict"]),
        ("trainer.var_wo_ddp", "trainer.var_ema_wo_ddp", ["ema", "var_ema_wo_ddp", "trainer.var_ema_wo_ddp"]),
        ("model.var", "averages.ema.var", ["ema", "averages", "averages.ema.var"]),
    ],
)
def test_averaged_weights_are_chosen_by_name(
    tmp_path: Path, parts: Parts, trained: str, average: str, names: list[str]
) -> None:
    content: dict[str, Any] = {"vae": parts[1], "epoch": 3}
    for prefix, tensors in ((trained, wrapped(parts[0])), (average, wrapped(averaged(parts[0])))):
        *path, last = prefix.split(".")
        at = content
        for part in path:
            at = at.setdefault(part, {})
        at[last] = tensors
    torch.save(content, tmp_path / "last.pth")
    bias = parts[0]["head.bias"]
    usual = load_any(tmp_path / "last.pth")
    assert torch.equal(usual.transformer.head.bias, bias)
    assert any(repr(trained) in note and "--weights" in note and average in note for note in usual.notes)
    own = trained.rpartition(".")[2] if trained.rpartition(".")[2] != "var" else "model"
    assert torch.equal(av.load(tmp_path / "last.pth", weights=own).transformer.head.bias, bias)
    for name in names:
        model = av.load(tmp_path / "last.pth", weights=name)
        assert torch.equal(model.transformer.head.bias, bias + 0.5), name
        assert not any("--weights" in note for note in model.notes), "nothing is left to be said"


def test_weights_at_the_top_of_a_file_are_called_a_point(tmp_path: Path, parts: Parts) -> None:
    torch.save({**parts[0], "ema": averaged(parts[0]), "vae": parts[1]}, tmp_path / "last.pth")
    bias = parts[0]["head.bias"]
    for weights, expected in ((None, bias), (".", bias), ("ema", bias + 0.5)):
        assert torch.equal(av.load(tmp_path / "last.pth", weights=weights).transformer.head.bias, expected)


def test_a_name_that_means_nothing_or_several_is_refused_with_those_that_are_there(
    tmp_path: Path, parts: Parts
) -> None:
    torch.save({"a": {"ema": parts[0]}, "b": {"ema": parts[0]}, "vae": parts[1]}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x\.pth: there are several weights called 'ema'.*--weights: a\.ema, b\.ema"):
        av.load(tmp_path / "x.pth", weights="ema")
    assert av.load(tmp_path / "x.pth", weights="b").origin["shape"] == "weights=b"
    with pytest.raises(InputError, match=r"there are no weights called 'mean'; .*--weights: a\.ema, b\.ema"):
        av.load(tmp_path / "x.pth", weights="mean")
    torch.save(parts[0], tmp_path / "x.pth")
    torch.save(parts[1], tmp_path / "vae.pth")
    for read in (av.load, av.inspect, av.report_flops):
        with pytest.raises(InputError, match=r"no weights called 'ema'; give one of these with --weights: \."):
            read(tmp_path / "x.pth", weights="ema")  # type: ignore[operator]
    with pytest.raises(InputError, match=r"the shape of fashion is known\. Leave weights out"):
        av.load("fashion", weights="ema")
    with pytest.raises(InputError, match="weights is given twice, as 'a' and in the shape as 'b'"):
        av.load(tmp_path / "x.pth", weights="a", shape={"weights": "b"})
    with pytest.raises(InputError, match="this is no shape"):
        av.load(tmp_path / "x.pth", weights="a,b")


def test_both_parts_are_those_of_the_name(tmp_path: Path, parts: Parts) -> None:
    other = {name: t + 1 if name == "quant_conv.bias" else t for name, t in parts[1].items()}
    content = {"model": {"var": parts[0], "vae": parts[1]}, "ema": {"var": averaged(parts[0]), "vae": other}}
    torch.save(content, tmp_path / "last.pth")
    model = av.load(tmp_path / "last.pth", weights="ema")
    assert torch.equal(model.transformer.head.bias, parts[0]["head.bias"] + 0.5)
    assert torch.equal(model.tokenizer.quant_conv.bias, other["quant_conv.bias"])
    torch.save({"var": averaged(parts[0])}, tmp_path / "alone.pth")
    torch.save({"model": parts[1], "ema": other}, tmp_path / "vae.pth")
    model = av.load(tmp_path / "alone.pth", weights="var")
    assert torch.equal(model.tokenizer.quant_conv.bias, parts[1]["quant_conv.bias"])
    assert any(note.startswith("vae.pth: of 2 tokenizers") for note in model.notes)


def test_the_choice_is_kept_with_what_is_made(tmp_path: Path, parts: Parts, sparse: Model) -> None:
    source = tmp_path / "last.pth"
    torch.save({"model": parts[0], "ema": averaged(parts[0]), "vae": parts[1]}, source)
    recipe = Recipe(name="x", model=str(source))
    runs = {name: Run.of(av.load(source, weights=name), recipe) for name in ("model", "ema")}
    assert runs["model"].key != runs["ema"].key and runs["model"].start != runs["ema"].start
    folder = save_sparse(sparse, tmp_path / "out", provenance=runs["ema"].origin, recipe_text="a: 1\n")
    recorded = read_provenance(folder)
    assert recorded.shape is not None and recorded.shape.weights == "ema"
    teacher = recorded_teacher(load_any(folder))
    assert torch.equal(teacher.transformer.head.bias, parts[0]["head.bias"] + 0.5)


def test_every_command_chooses_and_says_what_it_took(tmp_path: Path, parts: Parts) -> None:
    source = tmp_path / "last.pth"
    torch.save({"model": parts[0], "ema": averaged(parts[0]), "vae": parts[1]}, source)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="actvar")

    few = ("--images", 0, "--held-out", 2)
    commands: list[tuple[object, ...]] = [
        ("export", source, "--out"),
        ("sample", source, "--labels", "0", "--out"),
        ("evaluate", source, "--teacher", source, *few, "--format", "json"),
        ("benchmark", source, "--batches", "1", "--repeats", "1", "--format", "json"),
        ("report-flops", source, "--format", "json"),
    ]
    for number, command in enumerate(commands):
        end = (tmp_path / f"{number}.png",) if command[-1] == "--out" else ()
        end = (tmp_path / f"{number}.pth",) if command[0] == "export" else end
        said = run(*command, *end, "--quiet")
        assert said.exit_code == 0, said.output
        lines = [line for line in said.stderr.splitlines() if "--weights" in line]
        loads = 2 if command[0] == "evaluate" else 1
        assert len(lines) == loads and all(line.startswith(f"actvar: {source}: of 2 transf") for line in lines)
        assert "of 2 transformers" not in said.stdout
        if command[-1] == "json":
            json.loads(said.stdout)
        again = run(*command, *((end[0].with_stem(f"{number}b"),) if end else ()), "--weights", "ema", "--quiet")
        assert again.exit_code == 0 and "--weights" not in again.stderr, again.output
    written = [torch.load(tmp_path / name)["head.bias"] for name in ("0.pth", "0b.pth")]
    assert torch.equal(written[0] + 0.5, written[1])
    inspected = run("inspect", source, "--format", "json")
    assert "of 2 transformers" in inspected.stdout and "of 2 transformers" not in inspected.stderr
    wrong = run("sample", source, "--weights", "mean", "--out", tmp_path / "x.png")
    assert (wrong.exit_code, wrong.stdout) == (2, "") and "give one of these with --weights: ema, model" in wrong.stderr


def test_what_was_said_is_a_warning_in_the_log(
    official_pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "actvar_convert"):
        model = av.load(official_pair[0])
    assert [record.getMessage() for record in caplog.records] == [f"{official_pair[0]}: {note}" for note in model.notes]
    assert any("the tokenizer was taken from" in note for note in model.notes)
    caplog.clear()
    assert av.load("fashion").notes == [] and not caplog.records


def test_heads_and_pyramid_that_are_inferred_are_said(tmp_path: Path, parts: Parts) -> None:
    plain = {name: t for name, t in parts[0].items() if not name.endswith("scale_mul_1H11")}
    torch.save(plain, tmp_path / "var.pth")
    torch.save(parts[1], tmp_path / "vae.pth")
    notes = load_dense(tmp_path / "var.pth").notes
    assert any("1 heads follow the rule width / 64" in note for note in notes)
    assert any("no tensor tells residual_ratio; 0.5" in note for note in notes)
    told = load_dense(tmp_path / "var.pth", shape={"heads": 2, "residual_ratio": 0.5})
    assert len(told.notes) == 1 and "tokenizer was taken" in told.notes[0]
    (tmp_path / "config.json").write_text('{"heads": 2, "residual_ratio": 0.25}')
    by_file = load_dense(tmp_path / "var.pth")
    assert (by_file.config.heads, by_file.tokenizer.config.residual_ratio, len(by_file.notes)) == (2, 0.25, 1)


@pytest.mark.parametrize(
    "extra",
    [
        {"n_averaged": torch.tensor(3)},
        {"rope_cache": torch.zeros(4, 4)},
        {"blocks.0.attn.cos_cached": torch.zeros(4), "blocks.0.attn.cache.k": torch.zeros(2)},
        {"num_updates": torch.tensor(3), "decay": torch.tensor(0.9)},
        {"total_ops": torch.zeros(1), "blocks.1.ffn.total_params": torch.zeros(1)},
    ],
)
@pytest.mark.parametrize("wrap", [dict, wrapped])
def test_what_wrappers_leave_behind_is_left_out_and_said(
    tmp_path: Path, parts: Parts, dense: Model, same_model: Callable[[Model, Model], None], extra: dict[str, Tensor],
    wrap: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:  # fmt: skip
    torch.save({**wrap(parts[0]), **extra}, tmp_path / "var.pth")
    torch.save({**parts[1], "n_averaged": torch.tensor(3)}, tmp_path / "vae.pth")
    model = load_dense(tmp_path / "var.pth")
    same_model(model, dense)
    assert all(any("left out" in note and name in note for note in model.notes) for name in extra)
    assert "vae.pth: left out, since no model needs it: n_averaged" in model.notes


def test_weights_of_an_unknown_kind_are_still_refused(tmp_path: Path, parts: Parts) -> None:
    torch.save(parts[1], tmp_path / "vae.pth")
    for name in ("blocks.0.attn.rope.weight", "logit_scale", "blocks.0.attn.cachet.weight"):
        torch.save({**parts[0], name: torch.ones(1)}, tmp_path / "var.pth")
        with pytest.raises(CheckpointError, match=f"{name} is unknown"):
            load_dense(tmp_path / "var.pth")


def _shards(folder: Path, tensors: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    names = list(tensors)
    one, two = names[: len(names) // 2], names[len(names) // 2 :]
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({name: tensors[name] for name in one}, folder / files[0])
    save_file({**{name: tensors[name] for name in two}, **second}, folder / files[1])
    index = {**dict.fromkeys(one, files[0]), **dict.fromkeys(two, files[1])}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_a_tensor_comes_from_the_shard_that_the_index_names(
    tmp_path: Path, parts: Parts, dense: Model, same_model: Callable[[Model, Model], None]
) -> None:
    first = next(iter(parts[0]))
    _shards(tmp_path, parts[0], {first: torch.randn_like(parts[0][first]), "old.weight": torch.ones(2)})
    save_file(parts[1], tmp_path / "vae.safetensors")
    model = load_dense(tmp_path)
    same_model(model, dense)
    said = next(note for note in model.notes if "is taken from the file that it names" in note)
    assert f"{first} of model-00002-of-00002.safetensors" in said and "old.weight of model-00002" in said


@pytest.mark.parametrize("other", ["model.safetensors", "model.pth", "model.pt"])
def test_of_two_sets_of_weights_in_a_folder_the_newer_is_taken_and_said(
    tmp_path: Path, parts: Parts, other: str
) -> None:
    _shards(tmp_path, averaged(parts[0]), {})
    save_file(parts[1], tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text('{"residual_ratio": 0.25}')
    (save_file if other.endswith("tensors") else torch.save)(parts[0], tmp_path / other)
    index, shards = "model.safetensors.index.json", [file.name for file in tmp_path.glob("model-0000*")]

    def written(times: dict[str, int]) -> None:
        for name in (index, other, *shards):
            os.utime(tmp_path / name, ns=(0, times.get(name, 10**9)))

    for newest, expected in ((other, 0.0), (index, 0.5), (shards[-1], 0.5)):
        written({newest: 2 * 10**9})
        model = load_dense(tmp_path)
        assert torch.equal(model.transformer.head.bias, parts[0]["head.bias"] + expected)
        taken, left = (other, index) if newest == other else (index, other)
        said = f"{taken} was taken, the newest, and not {left}; to take that, give its path"
        assert said in model.notes and said in av.inspect(tmp_path).notes
    written({})
    for read in (load_dense, av.inspect, av.report_flops):
        with pytest.raises(CheckpointError, match=rf"holds model\.safetensors\.index\.json and {other}.*Name the one"):
            read(tmp_path)  # type: ignore[operator]
    for name, expected in ((other, 0.0), ("model.safetensors.index.json", 0.5)):
        model = load_dense(tmp_path / name)
        assert torch.equal(model.transformer.head.bias, parts[0]["head.bias"] + expected)
        assert model.tokenizer.config.residual_ratio == 0.25, "the configuration is that of either"


def test_two_tokenizers_beside_a_file_are_none(tmp_path: Path, parts: Parts) -> None:
    torch.save(parts[0], tmp_path / "var.pth")
    torch.save(parts[1], tmp_path / "vae.pth")
    save_file(parts[1], tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="no tokenizer in it, and no single one lies beside it"):
        load_dense(tmp_path / "var.pth")
    assert load_dense(tmp_path / "var.pth", tmp_path / "vae.pth").tokenizer.config.phis == 4


def test_a_sparse_folder_with_two_sets_of_weights_is_refused(tmp_path: Path, sparse: Model) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text="a: 1\n")
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.safetensors and model\.pth, and one of them may be out of date"):
        load_any(folder)


@pytest.mark.parametrize("options", [{"phis": 0, "residual_ratio": 0.0}, {"quant_kernel": 1}, {"quant_kernel": 5}])
def test_tokenizers_of_the_other_options_of_the_reference(
    tmp_path: Path, parts: Parts, dense: Model, options: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    config = TokenizerConfig(**{**dense.tokenizer.config.model_dump(), **options})
    own = VQVAE(config).eval()
    torch.save(parts[0], tmp_path / "var.pth")
    torch.save(own.state_dict(), tmp_path / "vae.pth")
    model = load_dense(tmp_path / "var.pth")
    assert model.tokenizer.config == config
    images = torch.rand(2, 3, config.image_size, config.image_size) * 2 - 1
    assert all(map(torch.equal, model.tokenizer.encode(images), own.encode(images)))
    assert model.generate([0, 1]).isfinite().all()
    assert any("no phi convolutions, as with quant_resi=0" in note for note in model.notes) == (config.phis == 0)
    usual, priced = decoder_macs(dense.tokenizer.config), decoder_macs(config)
    assert (priced.phi == 0) == (config.phis == 0)
    assert (priced.convolutions == usual.convolutions) == (config.quant_kernel == 3)


def test_what_a_map_becomes_without_phi_convolutions(dense: Model) -> None:
    """The reference has an identity there: what a scale adds is its codes, resized."""
    config = dense.tokenizer.config.model_copy(update={"phis": 0, "residual_ratio": 0.0})
    quantize = VQVAE(config).quantize
    index = torch.arange(16).view(1, 16)
    expected = quantize.embedding(index).transpose(1, 2).reshape(1, -1, 4, 4)
    assert torch.equal(quantize.contribution(3, index), expected)


def test_a_share_of_phi_convolutions_that_are_not_there_is_a_contradiction(tmp_path: Path, parts: Parts) -> None:
    torch.save(parts[0], tmp_path / "var.pth")
    torch.save({name: t for name, t in parts[1].items() if "quant_resi" not in name}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match=r"no phi convolutions .*residual_ratio, was given as 0\.5"):
        load_dense(tmp_path / "var.pth", shape={"residual_ratio": 0.5})


@pytest.mark.parametrize("place", ["shape", "config", "reference"])
def test_codes_by_direction_if_that_is_told(tmp_path: Path, parts: Parts, place: str) -> None:
    """The reference: argmax of the products of normalised vectors."""
    torch.save(parts[0], tmp_path / "var.pth")
    torch.save(parts[1], tmp_path / "vae.pth")
    content = {"config": {"using_znorm": True}, "reference": {"vae_kwargs": {"using_znorm": True}}}.get(place)
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    model = load_dense(tmp_path / "var.pth", shape={"using_znorm": True} if place == "shape" else None)
    assert model.tokenizer.config.using_znorm
    quantize, z = model.tokenizer.quantize, torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    normal = torch.nn.functional.normalize
    expected = (normal(z, dim=-1) @ normal(quantize.embedding.weight.T, dim=0)).argmax(1)
    assert torch.equal(quantize.nearest(z), expected)
    quantize.using_znorm = False
    assert not torch.equal(quantize.nearest(z), expected)


def test_a_word_within_a_longer_one_is_no_average(parts: Parts) -> None:
    found = split_parts({f"schema.{name}": tensor for name, tensor in parts[0].items()}, "schema")
    assert found.transformer is not None
    with pytest.raises(InputError, match="no weights called 'ema'"):
        split_parts({f"schema.{name}": tensor for name, tensor in parts[0].items()}, "ema")
