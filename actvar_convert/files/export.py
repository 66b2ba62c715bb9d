"""The way back: a model's dense skeleton under the official names, for programs that know VAR and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from actvar_convert.errors import InputError, counted, explain_os_errors
from actvar_convert.files.infinity import reference_names, reference_tokenizer_names
from actvar_convert.files.layout import reference_tokenizer
from actvar_convert.files.tensors import separate, size_of, write_tensors
from actvar_convert.models.infinity.config import InfinityConfig
from actvar_convert.models.model import Model
from actvar_convert.models.split import added, stored_name
from actvar_convert.system.atomic import replacing
from actvar_convert.system.device import require_space

ENDINGS = (".safetensors", ".pth", ".pt")


_NAMES = {"router": "routers", "gate": "token gates", "reconstruction": "reconstructions of skipped tokens"}
"""Roles of what a sparse block has beside the dense one, as people read them."""


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        files: the transformer's file, and the tokenizer's if it was asked for.
        left_out: what the reference has no place for, with the number of blocks that had it: "routers of 8 blocks".
    """

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


def dense_skeleton(model: Model) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of the transformer under their official names, and what was left out.

    The neurons of a sparse FFN go back to the places that ``ffn.permutation`` records, so an undistilled conversion
    gives its source bit by bit; routers, gates and reconstructions are dropped.
    """
    state, role = model.transformer.state_dict(), added(model.transformer)
    out: dict[str, Tensor] = {}
    dropped: dict[str, set[str]] = {}
    for name, tensor in state.items():
        if name in role:
            dropped.setdefault(_NAMES[role[name]], set()).add(name.split(".")[1])
        elif not name.endswith(".ffn.permutation"):
            out[stored_name(name)] = _in_order(name, tensor, state)
    if isinstance(model.config, InfinityConfig):
        out = reference_names(out, model.config)
    return out, tuple(f"{what} of {counted(len(blocks), 'block')}" for what, blocks in dropped.items())


def _in_order(name: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A tensor of an FFN with its neurons in the dense model's order; any other as it is."""
    block, _, leaf = name.partition(".ffn.")
    order = state.get(f"{block}.ffn.permutation")
    if order is None or leaf not in ("fc1.weight", "fc1.bias", "fc2.weight"):
        return tensor
    return tensor.index_select(1 if leaf == "fc2.weight" else 0, torch.argsort(order))


def export_reference(model: Model, out: Path, vae_out: Path | None = None) -> Exported:
    """Writes the dense skeleton, and if asked for the tokenizer, as files of the official layout.

    Args:
        model: sparse, or dense to change its format.
        out: file of the transformer, ending in .safetensors, .pth or .pt; nothing is replaced.
        vae_out: file of the tokenizer.

    Raises:
        InputError: an ending that says no format, a file that exists, or one that cannot be written. Nothing is left
            behind then.
    """
    _check_targets([path for path in (out, vae_out) if path is not None])
    transformer, left_out = dense_skeleton(model)
    parts = {out: transformer}
    if vae_out is not None:
        named = reference_tokenizer_names if isinstance(model.config, InfinityConfig) else reference_tokenizer
        parts[vae_out] = named(model.tokenizer.state_dict())
    written: list[Path] = []
    try:
        for path, tensors in parts.items():
            require_space(path.parent, size_of(tensors))
            with explain_os_errors("write", path), replacing(path) as temporary:
                _write(temporary, path.suffix, tensors)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return Exported(tuple(written), left_out)


def _check_targets(paths: list[Path]) -> None:
    problems = [f"{path}: end it in {', '.join(ENDINGS)}" for path in paths if path.suffix not in ENDINGS]
    problems += [f"{path}: exists already; choose another name, or remove it" for path in paths if path.exists()]
    problems += [f"there is no folder {path.parent}; make it first" for path in paths if not path.parent.is_dir()]
    if len({path.absolute() for path in paths}) < len(paths):
        problems.append(f"{paths[0]}: given for the transformer and for the tokenizer; give two files")
    if problems:
        raise InputError("cannot export:", problems)


def _write(path: Path, ending: str, tensors: Mapping[str, Tensor]) -> None:
    if ending == ".safetensors":
        write_tensors(path, tensors)
    else:
        with path.open("wb") as file:  # so that a full disk is an OSError
            torch.save(separate(tensors), file)
