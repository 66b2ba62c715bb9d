"""Which files of a folder, or beside a file, are the transformer and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from actvar_convert.errors import CheckpointError, InputError, explain_os_errors
from actvar_convert.files.tensors import INDEX_SUFFIX, read_json, require_exists, weight_file

SPARSE_FORMAT: Final = "actvar-sparse"

AS_VAE = "with --vae (vae=, or vae in a recipe: --set vae=FILE)"
"""How a tokenizer's file is given."""

_MODEL = ("model", "var", "pytorch_model")
"""Names of a folder's transformer, the most telling first."""

_WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", INDEX_SUFFIX)


class Located(NamedTuple):
    """Files of a dense model.

    Attributes:
        transformer: a weight file or an index of shards.
        tokenizer: the same for the VQVAE; None where nothing lies about.
        hints: the config.json of a hub folder, or beside the file that is the folder's model; empty without one.
    """

    transformer: Path
    tokenizer: Path | None
    hints: Mapping[str, Any]


def locate(source: Path, vae: Path | None) -> Located:
    """The files that a path and an optional tokenizer path mean.

    Raises:
        InputError: a path does not exist.
        CheckpointError: a folder without weights of a VAR, or with several; a file out of a sparse folder.
    """
    require_exists(source)
    _refuse_part_of_sparse(source)
    if vae is not None:
        require_exists(vae)
        vae = _in_folder(vae, ("vae", "vqvae", "model")) if vae.is_dir() else vae
    if source.is_dir():
        hints = _hints(source)
        return Located(_in_folder(source, _MODEL), vae or _beside(source), hints)
    return Located(source, vae or _beside(source.absolute().parent, source), _hints_beside(source))


def is_sparse_folder(folder: Path) -> bool:
    """Whether a folder is, or was before it was damaged, a sparse folder of this package."""
    with explain_os_errors("read", folder):
        if not folder.is_dir():
            return False
        config = folder / "config.json"
        if config.is_file():
            with config.open("rb") as file:
                return SPARSE_FORMAT.encode() in file.read(4096) or (folder / "recipe.yaml").is_file()
        return (folder / "recipe.yaml").is_file()


def _refuse_part_of_sparse(source: Path) -> None:
    folder = source.absolute().parent
    if source.is_file() and source.name.startswith("model") and is_sparse_folder(folder):
        raise CheckpointError(f"{source} is a part of the sparse model in {folder}. Give that folder.")


def _hints(folder: Path) -> Mapping[str, Any]:
    if (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is a diffusers pipeline, not a VAR. Give a VAR file or folder.")
    if not (folder / "config.json").is_file():
        return {}
    hints = read_json(folder / "config.json")
    architectures = hints.get("architectures")
    if architectures:
        raise CheckpointError(
            f"{folder} is a transformers model ({architectures}), not a VAR. Give a VAR file or folder."
        )
    if "_class_name" in hints:
        raise CheckpointError(
            f"{folder} is a diffusers model ({hints['_class_name']}), not a VAR. Give a VAR file or folder."
        )
    return hints


def _hints_beside(source: Path) -> Mapping[str, Any]:
    """The hints of the folder of a file, if giving the folder would mean this file."""
    folder = source.absolute().parent
    try:
        return _hints(folder) if _in_folder(folder, _MODEL).name == source.name else {}
    except InputError:
        return {}


def _in_folder(folder: Path, stems: tuple[str, ...]) -> Path:
    for stem in stems:
        found = weight_file(folder, stem)
        if found is not None:
            return found
    files = _weight_files(folder)
    if not files:
        inside = sorted(entry.name for entry in folder.iterdir())
        what = f"holds {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}" if inside else "is empty"
        raise CheckpointError(f"{folder} {what}: no weights (.safetensors, .pth) in it. Give the folder that has them.")
    if stems == _MODEL:
        files = [file for file in files if not file.name.startswith("vae")] or files
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds several files of weights ({', '.join(file.name for file in files[:6])}). Name one of them."
        )
    return files[0]


def _beside(folder: Path, source: Path | None = None) -> Path | None:
    """The tokenizer in a folder: the only file called ``vae*``."""
    found = weight_file(folder, "vae")
    if found is None:
        named = [file for file in _weight_files(folder) if file.name.startswith("vae")]
        found = named[0] if len(named) == 1 else None
    return None if source is not None and found == source.absolute() else found


def _weight_files(folder: Path) -> list[Path]:
    with explain_os_errors("read", folder):
        return sorted(file for file in folder.iterdir() if file.name.endswith(_WEIGHT_SUFFIXES) and file.is_file())
