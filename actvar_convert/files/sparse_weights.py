"""The tensors of a sparse folder, and the modules they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError, RecipeError
from actvar_convert.files.skeleton import NoWeights
from actvar_convert.files.sparse_config import SparseConfig
from actvar_convert.files.tensors import read_tensors, weight_file
from actvar_convert.models.sparse import SparseVARTransformer
from actvar_convert.models.vqvae import VQVAE


class SparseWeights(NamedTuple):
    """Tensors of the transformer and of the tokenizer by name."""

    transformer: dict[str, Tensor]
    tokenizer: dict[str, Tensor]


def read_sparse_weights(folder: Path) -> SparseWeights:
    """Maps the tensors of a sparse folder.

    Raises:
        CheckpointError: weights are missing or damaged; all problems at once.
    """
    problems: list[str] = []
    found: list[dict[str, Tensor]] = []
    for stem, what in (("model", "the weights of the transformer"), ("vae", "the weights of the tokenizer")):
        file = weight_file(folder, stem)
        if file is None:
            problems.append(f"{stem}.safetensors, {what}, is missing")
            continue
        try:
            found.append(read_tensors(file))
        except InputError as error:
            problems += [error.message, *error.problems]
    if problems:
        raise CheckpointError(f"{folder} is not complete. Restore it from a copy, or convert again:", problems)
    return SparseWeights(*found)


def sparse_skeleton(config: SparseConfig) -> tuple[SparseVARTransformer, VQVAE]:
    """Modules of a sparse model whose weights have shapes but no memory.

    Raises:
        CheckpointError: the plans cannot be executed by one model.
    """
    try:
        with NoWeights():
            return SparseVARTransformer(config.transformer, config.plans, config.default_plan), VQVAE(config.tokenizer)
    except RecipeError as error:
        raise CheckpointError(f"config.json: {error.message}", error.problems) from error


def permutation_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Blocks whose ``ffn.permutation`` is not a reordering of all neurons."""
    return [
        f"{name} is not a permutation of its {len(order)} neurons"
        for name, order in tensors.items()
        if name.endswith("ffn.permutation") and not torch.equal(order.sort().values, torch.arange(len(order)))
    ]
