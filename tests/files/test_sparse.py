"""Sparse folders: round trips, replacement, and everything that can happen to one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files import sparse_folder as sparse_files
from actvar_convert.files.sparse_folder import (
    REPORTS,
    Provenance,
    load_sparse,
    provenance_of,
    read_provenance,
    read_sparse_config,
    save_sparse,
    update_file,
)
from actvar_convert.files.upgrade import FORMAT_VERSION
from actvar_convert.models.model import Model
from actvar_convert.system.atomic import COMMIT

RECIPE = "name: tiny\nexperts:\n  count: 4\n"
FILES = ["config.json", "model.safetensors", "recipe.yaml", "vae.safetensors"]


@pytest.fixture
def folder(tmp_path: Path, sparse: Model) -> Path:
    return save_sparse(sparse, tmp_path / "runs" / "tiny", provenance={"name": "tiny"}, recipe_text=RECIPE)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_round_trip(folder: Path, sparse: Model, same_model: Callable[[Model, Model], None]) -> None:
    assert _names(folder) == FILES and _names(folder.parent) == ["tiny"]
    model = load_sparse(folder)
    same_model(model, sparse)
    assert (model.plans, model.sampling) == (sparse.plans, sparse.sampling)
    assert load_sparse(folder, plan="all").plan == sparse.plans.named["all"]
    assert {p.dtype for p in load_sparse(folder, dtype=torch.bfloat16).transformer.parameters()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["format_version"], config["default_plan"]) == ("actvar-sparse", 2, "default")
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777


def test_large_weights_are_sharded(
    tmp_path: Path,
    sparse: Model,
    same_model: Callable[[Model, Model], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse_files, "SHARD_BYTES", 200_000)
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text=RECIPE)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = sum(t.numel() * t.element_size() for shard in shards for t in load_file(folder / shard).values())
    assert total == index["metadata"]["total_size"]
    same_model(load_sparse(folder), sparse)
    monkeypatch.undo()
    save_sparse(sparse, folder, provenance={}, recipe_text=RECIPE)
    assert _names(folder) == FILES
    same_model(load_sparse(folder), sparse)


def test_provenance(tmp_path: Path, official_pair: tuple[Path, Path], sparse: Model) -> None:
    import hashlib

    given = provenance_of({"path": str(official_pair[0]), "vae": str(official_pair[1]), "name": "x"}, distilled=True)
    folder = save_sparse(sparse, tmp_path / "out", provenance=given, recipe_text=RECIPE)
    read = read_provenance(folder)
    assert read.source_sha256 == hashlib.sha256(official_pair[0].read_bytes()).hexdigest()
    assert read.vae_sha256 == hashlib.sha256(official_pair[1].read_bytes()).hexdigest()
    assert read.recipe_sha256 == hashlib.sha256(RECIPE.encode()).hexdigest()
    assert read.name == "x" and read.model_extra == {"distilled": True}
    assert read.tool_version == Provenance().tool_version
    again = save_sparse(load_sparse(folder), folder, provenance=read, recipe_text=RECIPE + "seed: 1\n")
    assert read_provenance(again).recipe_sha256 != read.recipe_sha256
    assert read_provenance(again).source_sha256 == read.source_sha256


def test_replacing_the_model_takes_its_reports_and_leaves_other_files(folder: Path, sparse: Model) -> None:
    for name in (*REPORTS, "plot.png"):
        update_file(folder, name, b"{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("kept")
    save_sparse(sparse, folder, provenance={"name": "second"}, recipe_text=RECIPE, extra_files={"eval.json": b"[]"})
    assert _names(folder) == sorted([*FILES, "eval.json", "notes", "plot.png"])
    assert (folder / "notes" / "mine.txt").read_text() == "kept"
    assert read_provenance(folder).name == "second"


def test_reports_may_be_edited_and_deleted(folder: Path, sparse: Model) -> None:
    for name in ("README.md", "flops.json", "samples.png"):
        update_file(folder, name, b"anything")
    (folder / "flops.json").write_text("edited")
    (folder / "samples.png").unlink()
    assert torch.equal(load_sparse(folder).transformer.pos_1LC, sparse.transformer.pos_1LC)
    for name in ("config.json", "model-00001-of-00002.safetensors", "../x", ".hidden", "sub/x"):
        with pytest.raises(InputError, match="name of a report"):
            update_file(folder, name, b"")


def test_recipe_line_ends_do_not_matter(folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(RECIPE.replace("\n", "\r\n").encode())
    assert load_sparse(folder).plans.name == "default"


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_replacement_is_finished_by_the_next_reader(
    folder: Path, tmp_path: Path, sparse: Model, moved: int
) -> None:
    """What a crash leaves after the commit: the new files complete in one folder, some of them moved already."""
    update_file(folder, "old-shard", b"")
    new = save_sparse(sparse, tmp_path / "new", provenance={"name": "new"}, recipe_text=RECIPE)
    for name in FILES[:moved]:
        shutil.copy(new / name, folder / name)
        (new / name).unlink()
    (new / "manifest.json").write_text(json.dumps({"files": FILES, "stale": ["old-shard"]}))
    new.rename(folder / COMMIT)
    assert read_provenance(folder).name == "new"
    assert _names(folder) == FILES
    assert load_sparse(folder).plans.name == "default"


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_part(folder: Path, part: str, **changes: object) -> None:
    _edit_config(folder, **{part: json.loads((folder / "config.json").read_text())[part] | changes})


def _edit_weights(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "config deleted": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config truncated": (lambda f: _truncate(f / "config.json"), "not valid JSON"),
    "config emptied": (lambda f: (f / "config.json").write_text(""), "it is empty"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON list"),
    "format unknown": (lambda f: _edit_config(f, format="other"), "format is not 'actvar-sparse'"),
    "version newer": (lambda f: _edit_config(f, format_version=7), "Upgrade actvar-convert"),
    "version odd": (lambda f: _edit_config(f, format_version="1"), "format_version '1'"),
    "version is a truth": (lambda f: _edit_config(f, format_version=True), "format_version True"),
    "family missing": (lambda f: _edit_config(f, family=None), "family"),
    "number as a text": (
        lambda f: _edit_part(f, "transformer", depth="2"), "transformer.depth: Input should be a valid integer"
    ),
    "truth as a number": (lambda f: _edit_part(f, "transformer", shared_adaln=0), "transformer.shared_adaln: "),
    "share of a convolution edited": (
        lambda f: _edit_part(f, "tokenizer", residual_ratio=0.3), "was changed since the model was made"
    ),
    "sampling edited": (lambda f: _edit_part(f, "sampling", cfg=9.0), "was changed since the model was made"),
    "key unknown": (lambda f: _edit_config(f, surprise=1), "surprise"),
    "plans missing": (lambda f: _edit_config(f, plans={}), "plans"),
    "default plan unknown": (lambda f: _edit_config(f, default_plan="nope"), "'nope' is not among the plans"),
    "weights deleted": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors, the weights"),
    "weights truncated": (lambda f: _truncate(f / "model.safetensors"), "truncated safetensors"),
    "weights emptied": (lambda f: (f / "model.safetensors").write_bytes(b""), "an empty file"),
    "tokenizer deleted": (lambda f: (f / "vae.safetensors").unlink(), "weights of the tokenizer, is missing"),
    "tokenizer truncated": (lambda f: _truncate(f / "vae.safetensors"), "truncated safetensors"),
    "recipe deleted": (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml, the recipe that made the model"),
    "recipe truncated": (lambda f: _truncate(f / "recipe.yaml"), "recipe.yaml"),
    "recipe emptied": (lambda f: (f / "recipe.yaml").write_text(""), "recipe.yaml is empty"),
    "recipe is no yaml": (lambda f: (f / "recipe.yaml").write_text("a: ["), "not valid YAML"),
    "recipe edited": (lambda f: (f / "recipe.yaml").write_text("name: other\n"), "SHA-256 differs"),
    "tensor missing": (lambda f: _edit_weights(f, "blocks.1.ffn.fc1.bias", None), "fc1.bias is missing"),
    "tensor transposed": (lambda f: _edit_weights(f, "head.weight", lambda t: t.T), "head.weight: [64, 32]"),
    "tensor not finite": (lambda f: _edit_weights(f, "blocks.0.gate.linear.bias", _fill(torch.nan)), "1 NaN"),
    "permutation broken": (lambda f: _edit_weights(f, "blocks.0.ffn.permutation", _fill(3)), "not a permutation"),
    "another model's weights": (
        lambda f: shutil.copy(f / "vae.safetensors", f / "model.safetensors"), "pos_start is missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(folder: Path, damage: str) -> None:
    harm, expected = DAMAGES[damage]
    harm(folder)
    before = _names(folder)
    with pytest.raises(CheckpointError) as caught:
        load_sparse(folder)
    assert expected in str(caught.value)
    assert str(folder) in caught.value.message
    assert "Restore" in str(caught.value) or "Upgrade" in str(caught.value)
    assert _names(folder) == before


def test_all_damage_is_named_at_once(folder: Path) -> None:
    _truncate(folder / "config.json")
    (folder / "recipe.yaml").unlink()
    (folder / "vae.safetensors").unlink()
    _truncate(folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_sparse(folder)
    text = "\n".join(caught.value.problems)
    assert all(word in text for word in ("config.json", "recipe.yaml", "vae.safetensors", "model.safetensors"))


def test_plan_for_another_depth(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["plans"]["default"]["blocks"].append(content["plans"]["default"]["blocks"][0])
    _edit_config(folder, plans=content["plans"])
    with pytest.raises(CheckpointError, match="3 blocks given, the model has 2"):
        load_sparse(folder)


def test_unknown_plan(folder: Path) -> None:
    with pytest.raises(InputError, match="no plan 'fast'; it has default, all"):
        load_sparse(folder, plan="fast")


def test_spaces_and_order_of_the_configuration_do_not_matter(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert load_sparse(folder).plans.name == "default"
    del content["sha256"], content["family"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="family: Field required"):
        load_sparse(folder)


def test_a_folder_of_version_1_names_no_family(
    folder: Path, sparse: Model, same_model: Callable[[Model, Model], None]
) -> None:
    content = json.loads((folder / "config.json").read_text())
    assert content.pop("family") == "var"
    for plan in content["plans"].values():
        plan["skipped_kv"] = "dropped"
    (folder / "config.json").write_text(json.dumps({**content, "format_version": 1}))
    same_model(load_sparse(folder), sparse)
    assert read_sparse_config(folder).format_version == FORMAT_VERSION


def test_a_family_of_nobody_is_refused(folder: Path) -> None:
    _edit_config(folder, family="rav")
    with pytest.raises(CheckpointError, match=r"family: .*'rav' is unknown to this version, which has var, "):
        load_sparse(folder)


def test_weights_that_are_not_finite_are_not_written(folder: Path, tmp_path: Path, sparse: Model) -> None:
    spoilt = copy.deepcopy(sparse)
    spoilt.transformer.head.weight.data[0, 0] = float("nan")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place in (folder, tmp_path / "new"):
        with pytest.raises(InputError, match=r"could not be read again\.\n  - head\.weight has 1 NaN"):
            save_sparse(spoilt, place, provenance=None, recipe_text="name: x\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not (tmp_path / "new").exists()


def test_foreign_folders_are_not_overwritten(tmp_path: Path, sparse: Model) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"depth": 16}')
    with pytest.raises(InputError, match="holds another model"):
        save_sparse(sparse, tmp_path / "hub", provenance={}, recipe_text=RECIPE)
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(InputError, match="in the way"):
            save_sparse(sparse, target, provenance={}, recipe_text=RECIPE)
    assert _names(tmp_path) == ["file", "hub"] and _names(tmp_path / "hub") == ["config.json"]


def test_a_made_up_shape_is_refused_before_anything_is_made_of_it(tmp_path: Path, sparse: Model) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text=RECIPE)
    path = folder / "config.json"
    right = json.loads(path.read_text())
    for part, field, value in (
        ("transformer", "depth", 10**7),
        ("transformer", "width", 2**40),
        ("transformer", "classes", 2**40),
        ("tokenizer", "ch_mult", [1] * 40),
        ("tokenizer", "res_blocks", 10**9),
    ):
        path.write_text(json.dumps(right | {part: right[part] | {field: value}}))
        with pytest.raises(CheckpointError, match=rf"{part}\.{field}: .*(less than or equal to|at most) "):
            load_sparse(folder)
    long = list(range(1, 40))
    path.write_text(json.dumps(right | {part: right[part] | {"sides": long} for part in ("transformer", "tokenizer")}))
    with pytest.raises(CheckpointError, match="a pyramid of 20,540 tokens; at most 16,384 are supported"):
        load_sparse(folder)


def test_a_recipe_whose_aliases_grow_is_named(tmp_path: Path, sparse: Model) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text=RECIPE)
    lines = [f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}" for n in range(1, 60)]
    (folder / "recipe.yaml").write_text("\n".join(["k0: &k0 {a: 1}", *lines]))
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is not valid YAML: .*aliases written out"):
        load_sparse(folder)
