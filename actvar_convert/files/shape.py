"""The shape of a model by its name or path: what can be known of it without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from actvar_convert.errors import CheckpointError
from actvar_convert.files.bundled import bundled_config, bundled_names
from actvar_convert.files.describe import describe, dtype_name
from actvar_convert.files.infer import Overrides
from actvar_convert.files.inspection import Inspection, inspect_file
from actvar_convert.files.official import official_config, official_names
from actvar_convert.files.skeleton import NoWeights
from actvar_convert.files.source import is_sparse, refuse_unneeded, require_known
from actvar_convert.files.sparse_config import read_sparse_config
from actvar_convert.files.tensors import require_exists
from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var import VARTransformer
from actvar_convert.plan import SparsityPlan


class ModelShape(NamedTuple):
    """Configurations of a model.

    Attributes:
        tokenizer: None where none lies with the transformer.
        plans, default_plan: of a sparse model; none of a dense one.
        line: the model in words.
        parameters: values of the transformer's weights.
        dtype: number format of most of them: fp32, fp16, bf16, fp64.
    """

    transformer: TransformerConfig
    tokenizer: TokenizerConfig | None
    plans: Mapping[str, SparsityPlan]
    default_plan: str | None
    line: str
    parameters: int
    dtype: str

    def held_bytes(self, device: str) -> int:
        """Bytes that the weights take in memory, loaded in fp32 on this kind of device: none as pages of their file."""
        return 0 if self.dtype == "fp32" and device == "cpu" else 4 * self.parameters


def model_shape(
    source: str | Path,
    vae: str | Path | None = None,
    *,
    heads: int | None = None,
    residual_ratio: float | None = None,
    sides: Sequence[int] | None = None,
) -> ModelShape:
    """Shape of what ``load_any`` would load, from a configuration or from names and shapes of tensors.

    Args:
        source, vae, heads, residual_ratio, sides: as for ``load_any``; a published name needs neither file nor network.

    Raises:
        InputError: nothing has this name.
        CheckpointError: no VAR, or one that cannot be loaded, as far as names and shapes tell.
    """
    name = source if isinstance(source, str) else ""
    sparse = is_sparse(source)
    refuse_unneeded(source, vae, Overrides(heads, residual_ratio, sides))
    if vae is not None:
        require_exists(Path(vae))
    if name in official_names():
        transformer, tokenizer = official_config(name)
        return ModelShape(transformer, tokenizer, {}, None, *_described(transformer, torch.float32))
    if name in bundled_names():
        stored = bundled_config(name)
        transformer, tokenizer = TransformerConfig(**stored["transformer"]), TokenizerConfig(**stored["tokenizer"])
        return ModelShape(transformer, tokenizer, {}, None, *_described(transformer, torch.float16))
    require_known(source)
    found = inspect_file(source, vae, heads=heads, residual_ratio=residual_ratio, sides=sides)
    if found.config is None:
        raise CheckpointError(f"{source} is no VAR: {found.line}")
    if not found.complete:
        missing = [f"{tensor} is missing" for tensor in found.missing]
        unknown = [f"{tensor} is unknown" for tensor in found.unexpected]
        problems = [*missing, *found.mis_shaped, *unknown, *found.disagreements]
        more = [f"... and {len(problems) - 3} more"] if len(problems) > 3 else []
        raise CheckpointError(f"{source} cannot be loaded: {'; '.join([*problems[:3], *more])}")
    plans = read_sparse_config(Path(source)).plans if sparse else {}
    dtype = found.dtype or "fp32"
    return ModelShape(found.config, found.tokenizer, plans, found.default_plan, found.line, found.parameters, dtype)


def published_inspection(name: str) -> Inspection:
    """What an inspection of a published model's files would say of its shape; none of them is needed.

    Raises:
        InputError: no published model has this name.
    """
    transformer, tokenizer = official_config(name)
    line, parameters, dtype = _described(transformer, torch.float32)
    return Inspection(
        path=name,
        kind="var",
        line=line,
        config=transformer,
        tokenizer=tokenizer,
        parameters=parameters,
        dtype=dtype,
        notes=("this is the published shape of that name; no file was read",),
    )


def _described(config: TransformerConfig, dtype: torch.dtype) -> tuple[str, int, str]:
    """The model in words, its parameters, and the name of their format."""
    with NoWeights():
        transformer = VARTransformer(config)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    return describe(config, parameters, dtype), parameters, dtype_name(dtype)
