"""One line that says what a model is."""

from __future__ import annotations

import torch

from actvar_convert.files.infer import TokenizerShape
from actvar_convert.files.skeleton import FLOATS
from actvar_convert.models.config import TransformerConfig

TIMES = "\N{MULTIPLICATION SIGN}"


def describe(config: TransformerConfig, parameters: int, dtype: torch.dtype) -> str:
    """The transformer in one line.

    >>> describe(official_config("var-d16")[0], 310_283_520, torch.float32)
    'VAR-d16: 16 blocks, width 1024, 16 heads, 10 scales to 16x16, 1000 classes; 310 M parameters, fp32'
    (with a multiplication sign)
    """
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


def counted(number: int, word: str, plural: str | None = None) -> str:
    """A number and what it counts: 1 block, 2 blocks, 5 classes."""
    return f"{number} {word if number == 1 else plural or word + 's'}"
