"""The way back to official files: bit-equal for a conversion that was not distilled, whatever the shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.errors import InputError
from actvar_convert.files.dense import load_dense
from actvar_convert.files.export import dense_skeleton, export_reference
from actvar_convert.files.layout import reference_tokenizer, split_parts
from actvar_convert.files.sparse_folder import load_sparse, save_sparse
from actvar_convert.models.model import Model
from actvar_convert.models.split import expert_ffns
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.recipe.schema import BudgetRecipe, CalibrationRecipe, ExpertsRecipe, GateRecipe, Recipe

from ..conftest import convert_with, gated_plan

SHAPES: dict[str, dict[str, object]] = {
    "own AdaLN": {},
    "shared AdaLN": {"shared_adaln": True, "depth": 3},
    "plain attention, narrow FFN": {"l2_attention": False, "heads": 4, "hidden": 96},
    "another pyramid, one block": {"sides": (2, 5), "depth": 1, "classes": 3},
}


def dense_model(**changes: object) -> Model:
    shape = {"depth": 2, "width": 64, "heads": 2, "hidden": 128, "sides": (1, 2, 3), "vocab": 32, "z_channels": 8}
    config = TransformerConfig.model_validate({**shape, "classes": 5, **changes})
    torch.manual_seed(1)
    transformer = VARTransformer(config)
    for parameter in transformer.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape))
    tokenizer = TokenizerConfig(ch=32, ch_mult=(1,), res_blocks=1, vocab=32, z_channels=8, sides=config.sides, phis=1)
    return Model(transformer, VQVAE(tokenizer)).eval().requires_grad_(False)


def converted(dense: Model) -> Model:
    recipe = Recipe(
        name="x",
        model="x",
        experts=ExpertsRecipe(count=8),
        calibration=CalibrationRecipe(pyramids=6, batch=4),
        budget=BudgetRecipe(reduction=0.25, gate_keep=0.9),
        gate=GateRecipe(rank=2),
    )
    config = dense.config
    tokens = torch.randint(0, config.vocab, (6, config.schedule.total), generator=torch.Generator().manual_seed(0))
    plans, default = recipe_plans(config, recipe)
    plans = {name: gated_plan(plan, 0.9, blocks=range(config.depth)) for name, plan in plans.items()}
    return convert_with(dense, plans, default, recipe, tokens, torch.arange(6) % config.classes)


def assert_equal(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(given) == list(expected)
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype and torch.equal(given[name], tensor), name


@pytest.mark.parametrize(("shape", "ending"), list(zip(SHAPES, [".pth", ".safetensors"] * 2, strict=True)))
def test_an_undistilled_conversion_gives_its_source_bit_by_bit(tmp_path: Path, shape: str, ending: str) -> None:
    dense = dense_model(**SHAPES[shape])
    sparse = converted(dense)
    moved = [not torch.equal(f.permutation.sort().values, f.permutation) for f in expert_ffns(sparse.transformer)]
    assert any(moved), "no neuron changed its place: the test proves nothing"
    folder = save_sparse(sparse, tmp_path / "sparse", provenance={}, recipe_text="name: x\n")
    out, vae = tmp_path / f"var{ending}", tmp_path / f"vae{ending}"
    exported = export_reference(load_sparse(folder), out, vae)
    assert exported.files == (out, vae)
    depth = dense.config.depth
    whose = f"of {depth} block{'s' if depth > 1 else ''}"
    kinds = {"routers", "token gates", "reconstructions of skipped tokens"}
    assert set(exported.left_out) == {f"{kind} {whose}" for kind in kinds}
    read = load_file if ending == ".safetensors" else lambda file: torch.load(file, weights_only=True)
    wanted = dense.transformer.state_dict()
    given = read(out)
    assert_equal({name: given[name] for name in wanted}, wanted)
    assert set(given) == set(wanted)
    tokenizer = split_parts(read(vae)).tokenizer
    assert tokenizer is not None
    assert_equal({n: tokenizer[n] for n in sorted(tokenizer)}, dict(sorted(dense.tokenizer.state_dict().items())))


def test_the_files_are_read_as_any_official_ones(
    tmp_path: Path, dense: Model, sparse: Model, same_model: Callable[[Model, Model], None]
) -> None:
    for ffn, own in zip(expert_ffns(sparse.transformer), dense.transformer.blocks, strict=True):
        order = ffn.permutation
        ffn.fc1.weight.data, ffn.fc1.bias.data = own.ffn.fc1.weight[order], own.ffn.fc1.bias[order]
        ffn.fc2.weight.data = own.ffn.fc2.weight[:, order]
    export_reference(sparse, tmp_path / "var.pth", tmp_path / "vae.pth")
    same_model(load_dense(tmp_path / "var.pth"), dense)
    assert (tmp_path / "var.pth").stat().st_size < 1.2 * sum(
        t.numel() * t.element_size() for t in dense.transformer.state_dict().values()
    )


def test_a_dense_model_changes_its_format_alone(tmp_path: Path, dense: Model) -> None:
    exported = export_reference(dense, tmp_path / "var.safetensors")
    assert exported.left_out == () and exported.files == (tmp_path / "var.safetensors",)
    assert_equal(dense_skeleton(dense)[0], dense.transformer.state_dict())
    umask_mode = (tmp_path / "var.safetensors").stat().st_mode & 0o777
    (tmp_path / "other").touch()
    assert umask_mode == (tmp_path / "other").stat().st_mode & 0o777


def test_one_phi_has_the_name_that_the_reference_gives_it() -> None:
    names = reference_tokenizer(dense_model().tokenizer.state_dict())
    assert "quantize.quant_resi.qresi.weight" in names
    four = {f"quantize.quant_resi.qresi_ls.{i}.weight": torch.zeros(1) for i in range(4)}
    assert reference_tokenizer(four) == four


@pytest.mark.parametrize(
    ("out", "vae", "said"),
    [
        ("var.bin", None, "end it in .safetensors, .pth"),
        ("there.pth", None, "exists already"),
        ("var.pth", "there.pth", "exists already"),
        ("no/folder/var.pth", None, "there is no folder"),
        ("var.pth", "var.pth", "give two files"),
    ],
)
def test_targets_that_cannot_be_written(tmp_path: Path, dense: Model, out: str, vae: str | None, said: str) -> None:
    (tmp_path / "there.pth").write_text("mine")
    with pytest.raises(InputError, match=said):
        export_reference(dense, tmp_path / out, None if vae is None else tmp_path / vae)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"]
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_a_failure_leaves_neither_file(tmp_path: Path, dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    saved = torch.save

    def save(tensors: Mapping[str, Tensor], file: Path) -> None:
        if "encoder.conv_in.weight" in tensors:
            full_disk()
        saved(tensors, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match="the disk is full"):
        export_reference(dense, tmp_path / "var.pth", tmp_path / "vae.pth")
    assert not list(tmp_path.iterdir())
