"""A small dense and a small sparse model, and the ways in which people store them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actvar_convert.models.base import Sampling
from actvar_convert.models.model import Model
from actvar_convert.models.split import expert_ffns

LABELS = [0, 1]


@pytest.fixture
def dense(tiny_model: Model) -> Model:
    """The tiny model with a sampling of its own."""
    tiny_model.sampling = Sampling(2.0, 10, 0.9)
    return tiny_model


@pytest.fixture
def sparse(tiny_sparse: Model) -> Model:
    """The tiny sparse model with a sampling and orders of neurons of its own."""
    tiny_sparse.sampling = Sampling(1.25, 12, 0.8)
    for ffn in expert_ffns(tiny_sparse.transformer):
        order = torch.randperm(len(ffn.permutation), generator=torch.Generator().manual_seed(ffn.index))
        ffn.permutation.copy_(order)
    return tiny_sparse


@pytest.fixture
def parts(dense: Model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of transformer and tokenizer; the dictionaries may be changed, the tensors not."""
    return dict(dense.transformer.state_dict()), dict(dense.tokenizer.state_dict())


@pytest.fixture
def official_pair(tmp_path: Path, parts: tuple[dict[str, Tensor], dict[str, Tensor]]) -> tuple[Path, Path]:
    """The model as two PyTorch files, like the published ones."""
    files = tmp_path / "var_tiny.pth", tmp_path / "vae_tiny.pth"
    for file, tensors in zip(files, parts, strict=True):
        torch.save(tensors, file)
    return files


@pytest.fixture(scope="session")
def same_model() -> Callable[[Model, Model], None]:
    """Asserts that two models have equal weights and generate equal tokens."""

    def check(model: Model, expected: Model) -> None:
        assert model.config == expected.config
        assert model.tokenizer.config == expected.tokenizer.config
        ours, theirs = model.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert not tensor.is_meta and torch.equal(tensor, theirs[name]), name
        assert not model.training
        arguments = {"seed": 3, "sampling": Sampling(1.0, 8, 0.0)}
        tokens, wanted = (m.generate_tokens(LABELS, **arguments) for m in (model, expected))
        assert torch.equal(tokens, wanted)

    return check
