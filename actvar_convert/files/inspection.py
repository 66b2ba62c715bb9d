"""What is in a file or folder: a value that the loader's rules make and that a command line prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from actvar_convert.errors import counted
from actvar_convert.files import infinity
from actvar_convert.files.contents import Contents, steadily
from actvar_convert.files.dense import DenseFiles, problems_of, read_dense, what_instead
from actvar_convert.files.layout import (
    OPTIONAL_SUFFIXES,
    TokenizerShape,
    Told,
    agreement_problems,
    assumed_of_tokenizer,
    infer_incomplete,
    infer_tokenizer,
    missing_blocks,
    official_depth,
    told_of_tokenizer,
)
from actvar_convert.files.skeleton import (
    FLOATS,
    Comparison,
    common_dtype,
    compare,
    count_nonfinite,
    empty_backbone,
    empty_tokenizer,
)
from actvar_convert.files.sparse_folder import (
    SparseConfig,
    checked_config,
    is_sparse_folder,
    open_sparse_weights,
    sparse_skeleton,
)
from actvar_convert.files.tensors import require_exists, sniff
from actvar_convert.models.infinity.config import BSQConfig, InfinityConfig
from actvar_convert.models.infinity.schedules import RATIOS
from actvar_convert.models.schedule import Config
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.shape import Shape, ShapeLike, shape_of

TIMES = "\N{MULTIPLICATION SIGN}"

Kind = Literal["var", "vqvae", "infinity", "bsq", "sparse", "other"]


class Inspection(BaseModel):
    """What a file or folder holds.

    Names of tensors in ``missing``, ``unexpected`` and ``mis_shaped`` are those of the reference; the tokenizer's start
    with ``tokenizer.`` when both parts are there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    schema_: str = Field("actvar.inspect/1", alias="schema", description="name and version of this report")
    path: str
    kind: Kind = Field(
        description="var, infinity: a transformer, with or without tokenizer; vqvae, bsq: a tokenizer alone"
    )
    line: str = Field(description="everything important in one line")
    config: TransformerConfig | InfinityConfig | None = Field(None, description="shape of the transformer")
    tokenizer: TokenizerConfig | BSQConfig | None = Field(
        None, description="shape of the tokenizer, if its pyramid is known"
    )
    parameters: int = Field(0, description="values of all weights of the transformer (of the VQVAE if it is alone)")
    dtype: str | None = Field(None, description="dtype of most weights")
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mis_shaped: tuple[str, ...] = Field((), description="name: shape in the file, shape needed")
    disagreements: tuple[str, ...] = Field((), description="where transformer and tokenizer contradict each other")
    nonfinite: int | None = Field(None, description="NaN and infinite values; None: not counted")
    guess: str | None = Field(None, description="what the file is when it is not a VAR")
    notes: tuple[str, ...] = Field((), description="what was assumed or is odd, one sentence each")
    plans: dict[str, float] = Field({}, description="sparse: share of the FFN work that every plan computes")
    default_plan: str | None = Field(None, description="sparse: the active plan")
    provenance: dict[str, Any] = Field({}, description="sparse: tool version, source and recipe with their hashes")

    @property
    def complete(self) -> bool:
        """Whether nothing keeps the model from being loaded, as far as was looked."""
        broken = self.missing or self.unexpected or self.mis_shaped or self.disagreements or self.nonfinite
        return self.kind != "other" and not broken

    def to_json(self) -> str:
        """The report as one JSON object."""
        return self.model_dump_json(indent=2, by_alias=True)


def inspect_file(
    path: str | Path,
    vae: str | Path | None = None,
    *,
    values: bool = False,
    shape: ShapeLike = None,
) -> Inspection:
    """Tells what is in a weight file, a dense folder or a sparse folder from names and shapes.

    Args:
        path: file or folder. vae and shape are for dense ones, see ``refuse_unneeded``.
        vae: tokenizer file, to check that it fits.
        values: also read every value and count those that are NaN or infinite.
        shape: what a dense one's files do not tell, see Shape.

    Raises:
        InputError: no such path, or no permission.
        CheckpointError: the file is damaged or would need code execution; a sparse folder is not complete.
    """
    path = Path(path)
    require_exists(path)
    known = shape_of(shape)
    if is_sparse_folder(path):
        return steadily(lambda: _inspect_sparse(path, values))
    if path.is_file() and not path.name.endswith(".json"):
        sniffed = sniff(path)
        if sniffed.format == "other":
            return Inspection(
                path=str(path), kind="other", line=f"Not weights: {sniffed.what}. {sniffed.remedy}", guess=sniffed.what
            )
    return steadily(lambda: _inspect_dense(path, None if vae is None else Path(vae), known, values))


def _inspect_dense(path: Path, vae: Path | None, known: Shape, values: bool) -> Inspection:
    files = read_dense(path, vae, known.weights)
    with problems_of(path):
        if files.family == "infinity" and (files.transformer is not None or files.tokenizer is not None):
            return _inspect_infinity(path, files, known, values)
        if files.transformer is not None:
            return _inspect_transformer(path, files, known, values)
        if files.tokenizer is not None:
            return _inspect_tokenizer(path, files, values)
    what = what_instead(files.rest)
    return Inspection(path=str(path), kind="other", line=f"Not a VAR: {what}.", guess=what, notes=tuple(files.notes))


def _findings(read_by: Contents | None, *parts: tuple[str, nn.Module, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What is wrong with the tensors of (prefix of names, module, tensors), as fields of an Inspection.

    Values are looked at, one tensor after another, if something is given that reads them.
    """
    found = [(prefix, compare(module, tensors)) for prefix, module, tensors in parts]
    nonfinite = None
    if read_by is not None:
        weights = [{name: t for name, t in tensors.items() if t.dtype in FLOATS} for _, _, tensors in parts]
        each = (count_nonfinite({name: value}) for part in weights for name, value in read_by.each(part))
        nonfinite = sum(sum(counts.values()) for counts in each)
    return {
        **{
            field: tuple(prefix + line for prefix, comparison in found for line in getattr(comparison, field))
            for field in Comparison._fields
        },
        "nonfinite": nonfinite,
    }


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for name, t in tensors.items() if not name.endswith(OPTIONAL_SUFFIXES))


def _inspect_transformer(path: Path, files: DenseFiles, known: Shape, values: bool) -> Inspection:
    assert files.transformer is not None
    config, assumed = infer_incomplete(files.transformer, known, files.hints)
    whole = missing_blocks(config, files.hints)
    needed = config if whole is None else config.model_copy(update={"depth": whole[0]})
    parts: list[tuple[str, nn.Module, Mapping[str, Tensor]]] = [("", empty_backbone(needed), files.transformer)]
    notes = [*files.notes, *assumed]
    published = official_depth(config)
    if whole is not None:
        notes.append(f"the file ends after {counted(config.depth, 'block')}; {whole[1]}: the rest is missing")
    elif published is not None and published != config.depth:
        notes.append(f"width {config.width} is that of VAR-d{published}; this one has {config.depth} blocks")
    tokenizer, disagreements = None, []
    if files.tokenizer is not None:
        shape, told = infer_tokenizer(files.tokenizer), told_of_tokenizer(known, files.hints)
        tokenizer = shape.config(config.sides, told)
        notes += assumed_of_tokenizer(tokenizer, told, config)
        parts.append(("tokenizer.", empty_tokenizer(tokenizer), files.tokenizer))
        disagreements = agreement_problems(config, shape)
        notes.append(describe_tokenizer(shape, _parameters(files.tokenizer), common_dtype(files.tokenizer.values())))
    parameters, dtype = _parameters(files.transformer), common_dtype(files.transformer.values())
    return Inspection(
        path=str(path),
        kind="var",
        line=describe(config, parameters, dtype),
        config=config,
        tokenizer=tokenizer,
        parameters=parameters,
        dtype=dtype_name(dtype),
        disagreements=tuple(disagreements),
        notes=tuple(notes),
        **_findings(files.contents if values else None, *parts),
    )


def _inspect_infinity(path: Path, files: DenseFiles, known: Shape, values: bool) -> Inspection:
    """An Infinity, or its tokenizer alone."""
    notes, disagreements, vae = [*files.notes], [], None
    parts: list[tuple[str, nn.Module, Mapping[str, Tensor]]] = []
    config = None
    if files.transformer is not None:
        config, assumed = infinity.infer_whole(files.transformer, known, files.hints, path)
        parts.append(("", empty_backbone(config), infinity.own_names(files.transformer)))
        notes += assumed
    if files.tokenizer is not None:
        own = infinity.own_tokenizer_names(files.tokenizer)
        vae = infinity.infer_tokenizer(own, None, RATIOS[1.0] if config is None else config.maps)
        if config is not None and config.bits in (vae.bits, 4 * vae.bits):
            vae = infinity.infer_tokenizer(own, config.bits, config.maps)
            notes += infinity.doubts(config, files.vae or path)
        elif config is not None:
            disagreements.append(f"bits of a token: transformer {config.bits}, tokenizer {vae.bits} or {4 * vae.bits}")
        parts.append(("tokenizer." if config else "", empty_tokenizer(vae), own))
    weights = parts[0][2]
    parameters, dtype = sum(t.numel() for t in weights.values()), common_dtype(weights.values())
    said = (
        describe_bsq(cast(BSQConfig, vae), parameters, dtype) if config is None else describe(config, parameters, dtype)
    )
    return Inspection(
        path=str(path),
        kind="bsq" if config is None else "infinity",
        line=said,
        config=config,
        tokenizer=None if config is None else vae,
        parameters=parameters,
        dtype=dtype_name(dtype),
        disagreements=tuple(disagreements),
        notes=tuple(notes),
        **_findings(files.contents if values else None, *parts),
    )


def _inspect_tokenizer(path: Path, files: DenseFiles, values: bool) -> Inspection:
    assert files.tokenizer is not None
    shape = infer_tokenizer(files.tokenizer)
    parameters, dtype = _parameters(files.tokenizer), common_dtype(files.tokenizer.values())
    return Inspection(
        path=str(path),
        kind="vqvae",
        line=describe_tokenizer(shape, parameters, dtype),
        parameters=parameters,
        dtype=dtype_name(dtype),
        notes=("the pyramid is not in this file; it comes with the transformer", *files.notes),
        **_findings(files.contents if values else None, ("", empty_tokenizer(_any_pyramid(shape)), files.tokenizer)),
    )


def _any_pyramid(shape: TokenizerShape) -> TokenizerConfig:
    """A configuration whose tensors have the right shapes, whatever the sides are."""
    return shape.config(range(1, (shape.scales or 1) + 1), Told())


def _inspect_sparse(folder: Path, values: bool) -> Inspection:
    config = checked_config(folder)
    contents, weights, vae_weights = open_sparse_weights(folder)
    transformer, tokenizer, _ = sparse_skeleton(config)
    parameters, dtype = _parameters(weights), common_dtype(weights.values())
    plans = {name: _active_share(cast(Config, config.transformer), plan) for name, plan in config.plans.items()}
    said = describe(cast(TransformerConfig, config.transformer), parameters, dtype)
    return Inspection(
        path=str(folder),
        kind="sparse",
        line=f"Sparse {said}; {_plans_text(config, plans)}",
        config=config.transformer,
        tokenizer=config.tokenizer,
        parameters=parameters,
        dtype=dtype_name(dtype),
        plans=plans,
        default_plan=config.default_plan,
        provenance=config.provenance.model_dump(exclude_none=True),
        notes=(f"tokenizer: {count_text(_parameters(vae_weights))} parameters",),
        **_findings(contents if values else None, ("", transformer, weights), ("tokenizer.", tokenizer, vae_weights)),
    )


def _active_share(config: Config, plan: SparsityPlan) -> float:
    """Share of all (token, expert) pairs of an image that the plan computes."""
    lengths = config.schedule.lengths
    computed = sum(
        plan.active(block, scale) * plan.blocks[block].kept(scale, length)
        for block in range(config.depth)
        for scale, length in enumerate(lengths)
    )
    return computed / (plan.experts * config.depth * config.schedule.total)


def _plans_text(config: SparseConfig, plans: Mapping[str, float]) -> str:
    default = config.default_plan
    text = f"plan {default}: {plans[default]:.0%} of the expert work ({config.plans[default].experts} experts per FFN)"
    if config.plans[default].guidance == "folded":
        text += ", guidance folded in"
    return text if len(plans) == 1 else f"{text} ({len(plans)} plans)"


def describe_infinity(config: InfinityConfig, parameters: int, dtype: torch.dtype) -> str:
    """An Infinity transformer in one line."""
    h, w = config.maps[-1]
    parts = [
        counted(config.depth, "block"),
        f"width {config.width}",
        counted(config.heads, "head"),
        f"{counted(config.bits, 'bit')} a token",
        f"{counted(config.num_scales, 'scale')} to {h}{TIMES}{w}",
        f"text rows of {config.text_width} channels",
    ]
    if config.hidden != 4 * config.width:
        parts.insert(2, f"FFN hidden {config.hidden}")
    return f"Infinity: {', '.join(parts)}; {count_text(parameters)} parameters, {dtype_name(dtype)}"


def describe_bsq(config: BSQConfig, parameters: int, dtype: torch.dtype) -> str:
    """A tokenizer of bits in one line."""
    parts = [
        f"{config.ch} channels",
        f"multipliers {','.join(map(str, config.ch_mult))}",
        counted(config.res_blocks, "residual block") + " per resolution",
        f"{2 ** (len(config.ch_mult) - 1)}{TIMES} down",
        f"codes of {counted(config.z_channels, 'bit')}",
    ]
    return f"Tokenizer of bits: {', '.join(parts)}; {count_text(parameters)} parameters, {dtype_name(dtype)}"


def describe(config: TransformerConfig | InfinityConfig, parameters: int, dtype: torch.dtype) -> str:
    """The transformer in one line.

    >>> describe(official_config("var-d16")[0], 310_283_520, torch.float32)
    'VAR-d16: 16 blocks, width 1024, 16 heads, 10 scales to 16x16, 1000 classes; 310 M parameters, fp32'
    (with a multiplication sign)
    """
    if isinstance(config, InfinityConfig):
        return describe_infinity(config, parameters, dtype)
    official = config.width == 64 * config.depth and config.heads == config.depth
    parts = [
        counted(config.depth, "block"),
        f"width {config.width}",
        counted(config.heads, "head"),
        f"{counted(len(config.sides), 'scale')} to {config.sides[-1]}{TIMES}{config.sides[-1]}",
        counted(config.classes, "class", "classes"),
    ]
    if config.hidden != 4 * config.width:
        parts.insert(2, f"FFN hidden {config.hidden}")
    if config.shared_adaln:
        parts.append("shared AdaLN")
    if not config.l2_attention:
        parts.append("plain attention")
    name = f"VAR-d{config.depth}" if official else "VAR"
    return f"{name}: {', '.join(parts)}; {count_text(parameters)} parameters, {dtype_name(dtype)}"


def describe_tokenizer(shape: TokenizerShape, parameters: int, dtype: torch.dtype) -> str:
    """The tokenizer in one line."""
    parts = [
        f"{shape.ch} channels",
        f"multipliers {','.join(map(str, shape.ch_mult))}",
        counted(shape.res_blocks, "residual block") + " per resolution",
        f"{shape.downsampling}{TIMES} down",
        f"codebook of {shape.vocab} by {shape.z_channels}",
    ]
    if shape.scales is not None:
        parts.append(counted(shape.scales, "scale"))
    return f"VQVAE: {', '.join(parts)}; {count_text(parameters)} parameters, {dtype_name(dtype)}"


def count_text(number: int) -> str:
    """A number of parameters as people say it: 310 M, 2.3 B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.0f} {letter}" if value >= 99.5 else f"{value:.1f} {letter}"
    return str(number)


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, fp16, bf16, fp64; other formats by their own name."""
    return FLOATS.get(dtype, str(dtype).removeprefix("torch."))
