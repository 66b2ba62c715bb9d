"""Loading a dense VAR from the files that people have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError
from actvar_convert.files.describe import counted
from actvar_convert.files.infer import (
    Overrides,
    agreement_problems,
    chosen_ratio,
    infer_tokenizer,
    infer_transformer,
    missing_blocks,
)
from actvar_convert.files.inspection import Inspection, inspect_file
from actvar_convert.files.locate import AS_VAE
from actvar_convert.files.official import published_sampling
from actvar_convert.files.parts import DenseFiles, problems_of, read_dense, what_instead
from actvar_convert.files.skeleton import assign, common_dtype, compare, empty_dense, nonfinite_problems
from actvar_convert.models.model import Sampling, VARModel

__all__ = ["Inspection", "build_dense", "inspect_file", "load_dense"]

DTypeChoice = torch.dtype | Literal["keep"] | None


def load_dense(
    source: str | Path,
    vae: str | Path | None = None,
    *,
    heads: int | None = None,
    residual_ratio: float | None = None,
    sides: Sequence[int] | None = None,
    dtype: DTypeChoice = None,
) -> VARModel:
    """A dense VAR from files; its shape is inferred from names and shapes of the tensors.

    Nothing in the files is executed. Weights stay in the mapped files until they are used where no conversion is
    needed, so peak memory is that of the model itself.

    Args:
        source: file (.pth, .safetensors, an index of shards) or folder of the transformer.
        vae: file or folder of the tokenizer; by default taken from the same checkpoint or the file called ``vae*``
            beside it.
        heads, residual_ratio, sides: see Overrides; inferred by default.
        dtype: floating-point dtype of the weights; None: float32; "keep": that of the files. The tokenizer is kept in
            float32 unless "keep" is asked for.

    Raises:
        InputError: a path that cannot be read.
        CheckpointError: the files are not a VAR, are damaged, or do not fit each other; all problems at once.
    """
    files = read_dense(Path(source), None if vae is None else Path(vae))
    overrides = Overrides(heads, residual_ratio, sides)
    model = build_dense(files, overrides, dtype)
    model.origin.update(overrides.as_origin())
    return model


def build_dense(
    files: DenseFiles, overrides: Overrides, dtype: DTypeChoice = None, sampling: Sampling | None = None
) -> VARModel:
    """A model from the tensors of files, after checking everything about them.

    Its sampling is the given one, else the published one for a model of a published shape, else the default.

    Raises:
        CheckpointError: all problems at once.
    """
    path = files.located.transformer
    if files.transformer is None:
        if files.tokenizer is not None:
            raise CheckpointError(
                f"{path} holds a VQVAE and no transformer. Give the VAR transformer, and this {AS_VAE}."
            )
        raise CheckpointError(f"{path} is not a VAR: {what_instead(files.rest)}. Give a VAR file or folder.")
    if files.tokenizer is None:
        raise CheckpointError(
            f"{path} has no tokenizer in it, and no single one lies beside it. Give the VQVAE file "
            f"{AS_VAE}. The published models all use vae_ch160v4096z32.pth of huggingface.co/FoundationVision/var."
        )
    with problems_of(path):
        config = infer_transformer(files.transformer, overrides, files.hints)
        whole = missing_blocks(config, files.hints)
        if whole is not None:
            raise CheckpointError(
                f"the file ends after {counted(config.depth, 'block')}; {whole.told_by}. It is incomplete: get it from "
                f"its source again. If the model is that shallow, say so in a config.json beside the file: "
                f'{{"depth": {config.depth}}}.'
            )
    tokenizer_path = files.located.tokenizer or path
    with problems_of(tokenizer_path):
        shape = infer_tokenizer(files.tokenizer)
        tokenizer_config = shape.config(config.sides, chosen_ratio(overrides, files.hints))
    disagreements = agreement_problems(config, shape)
    if disagreements:
        raise CheckpointError(
            f"the transformer {path} and the tokenizer {tokenizer_path} do not belong together; give the VQVAE that "
            "the transformer was trained with:",
            disagreements,
        )
    transformer, tokenizer = empty_dense(config, tokenizer_config)
    problems = [
        *_problems(path, transformer, files.transformer),
        *_problems(tokenizer_path, tokenizer, files.tokenizer),
    ]
    if problems:
        raise CheckpointError(f"{path} cannot be loaded as a VAR; get it from its source again:", problems)
    keep = dtype == "keep"
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.float32
    assign(transformer, files.transformer, common_dtype(files.transformer.values()) if keep else wanted)
    assign(tokenizer, files.tokenizer, common_dtype(files.tokenizer.values()) if keep else torch.float32)
    model = VARModel(transformer, tokenizer, sampling or published_sampling(config))
    model.eval()
    model.origin = {"path": str(path.absolute()), "vae": str(tokenizer_path.absolute())}
    return model


def _problems(path: Path, module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Structure first; values only of tensors whose structure is right."""
    found = compare(module, tensors).problems() or nonfinite_problems(tensors)
    return [f"{path.name}: {problem}" for problem in found]
