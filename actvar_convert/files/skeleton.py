"""Models without memory for their weights, to know what a file should hold and to take its tensors as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actvar_convert.files.contents import Contents
from actvar_convert.files.layout import DERIVED_SUFFIXES, OPTIONAL_SUFFIXES
from actvar_convert.models.families import family_of
from actvar_convert.models.split import split, stored_name, stored_state
from actvar_convert.plan import Plans

FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""Dtypes that weights may have, with the names that people read."""

_SHOWN = 12


_STARTING_VALUES = frozenset({"uniform_", "normal_", "kaiming_uniform_", "fill_", "zero_", "zeros_", "ones_"})
"""Functions that give weights their starting values. On tensors without memory they would do nothing, but only after
PyTorch has imported its symbolic arithmetic for them: a second, and 80 MB that stay."""


class NoWeights(TorchFunctionMode):
    """Inside, uninitialised tensors (weights of layers) have a shape but no memory; buffers have values as usual."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif getattr(func, "__name__", "") in _STARTING_VALUES:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


def empty_backbone(config: Any, plans: Plans | None = None) -> Any:
    """A backbone whose weights have shapes but no memory: dense, or split for the plans.

    Raises:
        RecipeError: the plans cannot be executed by one model.
    """
    with NoWeights():
        backbone = family_of(config).backbone(config)
        if plans is not None:
            split(backbone, plans)
    return backbone


def empty_tokenizer(config: Any) -> Any:
    """The same of a tokenizer."""
    with NoWeights():
        return family_of(config).tokenizer(config)


class Comparison(NamedTuple):
    """How the tensors of a file differ from those that its model needs.

    Attributes:
        missing: needed and absent (optional buffers are not needed).
        unexpected: present and unknown.
        mis_shaped: "name: shape in the file, shape needed"; dtypes that are no weights too.
    """

    missing: list[str]
    unexpected: list[str]
    mis_shaped: list[str]

    def problems(self) -> list[str]:
        """One line per problem; long lists are cut."""
        lines = [
            *_cut([f"{name} is missing" for name in self.missing]),
            *_cut([f"{line}" for line in self.mis_shaped]),
            *_cut([f"{name} is unknown" for name in self.unexpected]),
        ]
        return lines


def _cut(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more like the last"]


def compare(module: nn.Module, tensors: Mapping[str, Tensor]) -> Comparison:
    """Names and shapes of ``tensors`` against the state of ``module``."""
    needed = stored_state(module)
    missing = [name for name in needed if name not in tensors and not name.endswith(OPTIONAL_SUFFIXES)]
    mis_shaped = []
    for name, own in needed.items():
        given = tensors.get(name)
        if given is None:
            continue
        if given.shape != own.shape:
            mis_shaped.append(f"{name}: {list(given.shape)} in the file, {list(own.shape)} needed")
        elif own.is_floating_point() and given.dtype not in FLOATS and not name.endswith(DERIVED_SUFFIXES):
            mis_shaped.append(f"{name}: {given.dtype} in the file, fp16, bf16, fp32 or fp64 needed")
    return Comparison(missing, [name for name in tensors if name not in needed], mis_shaped)


def count_nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Names of tensors with NaN or infinite values, and how many; reads every value once, without a copy."""
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or name.endswith(DERIVED_SUFFIXES):
            continue
        if not all(bool(torch.isfinite(value)) for value in torch.aminmax(tensor)):
            found[name] = int((~torch.isfinite(tensor)).sum())
    return found


def read_values(
    contents: Contents, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[str]]:
    """Values of tensors, numbers with a fraction in a dtype; and which are not finite in the file, one line each.

    One tensor after another is read and converted. Buffers that follow from the configuration are left out.
    """
    wanted = {name: tensor for name, tensor in tensors.items() if not name.endswith(DERIVED_SUFFIXES)}
    values: dict[str, Tensor] = {}
    spoilt: dict[str, int] = {}
    for name, value in contents.each(wanted):
        spoilt |= count_nonfinite({name: value})
        values[name] = _converted(value, dtype)
    return values, _nonfinite_lines(spoilt)


def nonfinite_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """One line per tensor with NaN or infinite values."""
    return _nonfinite_lines(count_nonfinite(tensors))


def _nonfinite_lines(found: Mapping[str, int]) -> list[str]:
    return _cut([f"{name} has {count:,} NaN or infinite values" for name, count in found.items()])


def assign(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Makes ``tensors`` the weights of ``module`` without copying those that have the dtype already.

    The tensors must have been compared before; optional buffers that are absent keep the values of the module.
    """
    taken = {
        name: _converted(tensors[stored_name(name)], dtype)
        for name in module.state_dict()
        if stored_name(name) in tensors and not name.endswith(DERIVED_SUFFIXES)
    }
    module.load_state_dict(taken, strict=False, assign=True)
    module.to(dtype)
    module.eval()


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating-point dtype that most values have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
