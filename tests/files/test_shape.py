"""The shape of a model by its name or path, without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actvar_convert.errors import InputError
from actvar_convert.files.layout import official_config
from actvar_convert.files.source import model_shape
from actvar_convert.files.sparse_folder import save_sparse
from actvar_convert.models.model import Model


def test_names_files_and_folders(tmp_path: Path, official_pair: tuple[Path, Path], dense: Model, sparse: Model) -> None:
    published = model_shape("var-d36")
    assert (published.transformer, published.tokenizer) == official_config("var-d36") and published.plans == {}
    assert published.line.startswith("VAR-d36: 36 blocks") and published.line.endswith("fp32")
    file = model_shape(official_pair[0])
    assert (file.transformer, file.tokenizer) == (dense.config, dense.tokenizer.config)
    official_pair[1].rename(tmp_path / "elsewhere.pth")
    assert model_shape(official_pair[0]).tokenizer is None
    assert model_shape(official_pair[0], tmp_path / "elsewhere.pth").tokenizer == dense.tokenizer.config
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text="a: 1\n")
    found = model_shape(folder)
    assert (dict(found.plans), found.default_plan) == (sparse.plans.named, "default")


def test_what_could_not_be_loaded_has_no_shape(tmp_path: Path, official_pair: tuple[Path, Path], sparse: Model) -> None:
    tensors = torch.load(official_pair[0], weights_only=True)
    torch.save({**tensors, "a": torch.zeros(1), "b": torch.zeros(1)}, official_pair[0])
    for source, vae, said in (
        (official_pair[0], None, "a is unknown; b is unknown"),
        (official_pair[1], None, "is no VAR: VQVAE"),
        ("var-d61", None, "Did you mean .*var-d16"),
        ("var-d16", "nowhere.pth", "nowhere.pth does not exist"),
    ):
        with pytest.raises(InputError, match=said):
            model_shape(source, vae)
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text="a: 1\n")
    with pytest.raises(InputError, match="Leave vae out"):
        model_shape(folder, official_pair[1])
    for name in ("recipe.yaml", "vae.safetensors", "config.json"):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(InputError, match=name):
            model_shape(folder)
        (tmp_path / name).rename(folder / name)
