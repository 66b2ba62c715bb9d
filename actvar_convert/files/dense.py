"""Dense models in the files that people have: which files, whose tensors, and the model that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError, counted, explain_os_errors
from actvar_convert.files import infinity
from actvar_convert.files.layout import (
    Parts,
    agreement_problems,
    chosen_ratio,
    infer_tokenizer,
    infer_transformer,
    missing_blocks,
    published_sampling,
    split_parts,
    strip_wrappers,
)
from actvar_convert.files.skeleton import (
    assign,
    common_dtype,
    compare,
    empty_backbone,
    empty_tokenizer,
    nonfinite_problems,
)
from actvar_convert.files.sparse_folder import is_sparse_folder
from actvar_convert.files.tensors import INDEX_SUFFIX, read_json, read_tensors, require_exists, weight_file
from actvar_convert.models.base import Sampling
from actvar_convert.models.model import Model
from actvar_convert.recipe.shape import Shape, ShapeLike, shape_of

AS_VAE = "with --vae (vae=, or vae in a recipe: --set vae=FILE)"
"""How a tokenizer's file is given."""

_MODEL = ("model", "var", "pytorch_model")
"""Names of a folder's transformer, the most telling first."""

_WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", INDEX_SUFFIX)


_GUESSES: tuple[tuple[str, str], ...] = (
    (r"blocks\.0\.ffn\.permutation", "the weights of an actvar-sparse folder; give the folder itself"),
    (r"body\.0\.weight\n(.*\n)*head\.weight", "the image classifier that measures generations"),
    (r"(model\.)?diffusion_model\.|cond_stage_model\.", "a latent diffusion model (Stable Diffusion)"),
    (r"down_blocks\.\d|up_blocks\.\d|time_embedding\.linear", "a diffusers U-Net or autoencoder"),
    (r"(single_)?transformer_blocks\.\d|x_embedder\.|t_embedder\.", "a diffusion transformer (DiT)"),
    (r".*lora_(A|B|up|down)", "a LoRA adapter, not a whole model"),
    (r"text_proj_for_sos|cfg_uncond|block_chunks", "a part of an Infinity model (text to image)"),
    (r"(model\.)?(embed_tokens|layers\.\d+\.self_attn)|lm_head\.|transformer\.h\.\d|transformer\.wte", "an LLM"),
    (r"text_model\.|vision_model\.|visual\.", "a CLIP model"),
    (r"(bert\.|roberta\.)?encoder\.layer\.\d|shared\.weight", "a BERT or T5 model"),
    (r"cls_token|patch_embed\.proj", "a vision transformer (ViT)"),
    (r"layer1\.0\.conv1|layer1\.0\.bn1", "a ResNet"),
    (r"loss\.discriminator|encoder\.mid\.attn_1\.q\.", "a VQGAN (taming transformers), another kind of tokenizer"),
    (r"(.*\.)?exp_avg(_sq)?(\.|$)|state\.\d", "the state of an optimiser"),
)

DTypeChoice = torch.dtype | Literal["keep"] | None


class DenseFiles(NamedTuple):
    """The tensors of a dense model, found and named but not yet checked.

    Attributes:
        transformer, tokenizer: tensors by their reference names; None if there is none.
        path, vae: the files or indices of shards that they come from; vae None if there is no tokenizer.
        hints: the config.json of the folder, or beside the file that is the folder's model; empty without one.
        rest: names that belong to neither part.
        notes: choices that were made, one sentence each.
        family: whose names the tensors have.
    """

    transformer: dict[str, Tensor] | None
    tokenizer: dict[str, Tensor] | None
    path: Path
    vae: Path | None
    hints: Mapping[str, Any]
    rest: list[str]
    notes: list[str]
    family: str = "var"


def load_dense(
    source: str | Path,
    vae: str | Path | None = None,
    *,
    shape: ShapeLike = None,
    dtype: DTypeChoice = None,
) -> Model:
    """A dense VAR from files; its shape is inferred from names and shapes of the tensors.

    Nothing in the files is executed. Weights stay in the mapped files until they are used if no conversion is
    needed, so peak memory is that of the model itself.

    Args:
        source: file (.pth, .safetensors, an index of shards) or folder of the transformer.
        vae: file or folder of the tokenizer; by default taken from the same checkpoint or the file called ``vae*``
            beside it.
        shape: what the files do not tell, see Shape.
        dtype: floating-point dtype of the weights; None: float32; "keep": that of the files. The tokenizer is kept in
            float32 unless "keep" is asked for.

    Raises:
        InputError: a path that cannot be read.
        CheckpointError: the files are not a VAR, are damaged, or do not fit each other; all problems at once.
    """
    files = read_dense(Path(source), None if vae is None else Path(vae))
    known = shape_of(shape)
    model = build_dense(files, known, dtype)
    if known.given:
        model.origin["shape"] = known.text
    return model


def build_dense(files: DenseFiles, known: Shape, dtype: DTypeChoice = None, sampling: Sampling | None = None) -> Model:
    """A model from the tensors of files, after checking everything about them.

    Its sampling is the given one, else the published one for a model of a published shape, else the default.

    Raises:
        CheckpointError: all problems at once.
    """
    path = files.path
    words = _WORDS[files.family]
    if files.transformer is None:
        if files.tokenizer is not None:
            raise CheckpointError(
                f"{path} holds a {words.tokenizer} and no transformer. Give the {words.model} transformer, and this "
                f"{AS_VAE}."
            )
        raise CheckpointError(f"{path} is not a VAR: {what_instead(files.rest)}. Give a VAR file or folder.")
    if files.tokenizer is None:
        raise CheckpointError(
            f"{path} has no tokenizer in it, and no single one lies beside it. Give the {words.tokenizer} file "
            f"{AS_VAE}. {words.where}"
        )
    shaped = _shapes(files, known)
    tokenizer_path = files.vae or path
    transformer, tokenizer = empty_backbone(shaped.transformer), empty_tokenizer(shaped.tokenizer)
    problems = [
        *_problems(path, transformer, shaped.weights),
        *_problems(tokenizer_path, tokenizer, shaped.vae_weights),
    ]
    if problems:
        raise CheckpointError(
            f"{path} cannot be loaded as {words.a} {words.model}; get it from its source again:", problems
        )
    keep = dtype == "keep"
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.float32
    assign(transformer, shaped.weights, common_dtype(shaped.weights.values()) if keep else wanted)
    assign(tokenizer, shaped.vae_weights, common_dtype(shaped.vae_weights.values()) if keep else torch.float32)
    model = Model(transformer, tokenizer, sampling or shaped.sampling)
    model.eval()
    model.origin = {"path": str(path.absolute()), "vae": str(tokenizer_path.absolute())}
    return model


class _Words(NamedTuple):
    """A family in messages: article, what its models and tokenizers are called, where the published tokenizers are."""

    a: str
    model: str
    tokenizer: str
    where: str


_WORDS = {
    "var": _Words(
        "a",
        "VAR",
        "VQVAE",
        "The published models all use vae_ch160v4096z32.pth of huggingface.co/FoundationVision/var.",
    ),
    "infinity": _Words(
        "an",
        "Infinity",
        "tokenizer",
        f"Those of the published models are in huggingface.co/{infinity.REPOSITORY}: "
        + ", ".join(f"{each.vae} ({name})" for name, each in infinity.PUBLISHED.items())
        + ".",
    ),
}


class Shaped(NamedTuple):
    """What the tensors of files are: shapes of both parts, and the tensors by the names that the modules have.

    Attributes:
        sampling: of the published figures; None: of no published model.
        notes: what was assumed, a sentence each.
    """

    transformer: Any
    tokenizer: Any
    weights: dict[str, Tensor]
    vae_weights: dict[str, Tensor]
    sampling: Sampling | None
    notes: list[str]


def _shapes(files: DenseFiles, known: Shape) -> Shaped:
    """The shapes of a transformer and a tokenizer that were found, by their family.

    Raises:
        CheckpointError: they cannot be read, or contradict each other.
    """
    assert files.transformer is not None and files.tokenizer is not None
    path, tokenizer_path = files.path, files.vae or files.path
    if files.family == "infinity":
        weights, vae_weights = infinity.own_names(files.transformer), infinity.own_tokenizer_names(files.tokenizer)
        with problems_of(path):
            config, notes = infinity.infer_whole(files.transformer, known, files.hints, path)
        with problems_of(tokenizer_path):
            vae = infinity.infer_tokenizer(files.tokenizer, config.bits, config.maps)
        notes += infinity.doubts(config, tokenizer_path)
        return Shaped(config, vae, weights, vae_weights, infinity.published_sampling(config), notes)
    with problems_of(path):
        own = infer_transformer(files.transformer, known, files.hints)
        whole = missing_blocks(own, files.hints)
        if whole is not None:
            _, told_by = whole
            raise CheckpointError(
                f"the file ends after {counted(own.depth, 'block')}; {told_by}. It is incomplete: get it from "
                f"its source again. If the model is that shallow, say so in a config.json beside the file: "
                f'{{"depth": {own.depth}}}.'
            )
    with problems_of(tokenizer_path):
        shape = infer_tokenizer(files.tokenizer)
        tokenizer = shape.config(own.sides, chosen_ratio(known, files.hints))
    disagreements = agreement_problems(own, shape)
    if disagreements:
        raise CheckpointError(
            f"the transformer {path} and the tokenizer {tokenizer_path} do not belong together; give the VQVAE that "
            "the transformer was trained with:",
            disagreements,
        )
    return Shaped(own, tokenizer, files.transformer, files.tokenizer, published_sampling(own), [])


def read_dense(source: Path, vae: Path | None) -> DenseFiles:
    """Finds and maps the tensors of a dense model without looking at values.

    Raises:
        InputError, CheckpointError: see load_dense.
    """
    path, vae_path, hints = locate(source, vae)
    parts = _read_parts(path)
    tokenizer, notes = parts.tokenizer, list(parts.notes)
    if parts.transformer is not None and vae_path is not None and (vae is not None or tokenizer is None):
        separate, words = _read_parts(vae_path), _WORDS[parts.family]
        if separate.tokenizer is None or separate.family != parts.family:
            other = _WORDS[separate.family]
            what = (
                f"it is {other.a} {other.model} transformer"
                if separate.transformer is not None
                else f"it is one of {other.model}"
                if separate.tokenizer is not None
                else what_instead(separate.rest)
            )
            raise CheckpointError(
                f"{vae_path} has no {words.model} tokenizer in it: {what}. Give the {words.tokenizer} file {AS_VAE}."
            )
        tokenizer = separate.tokenizer
        notes += separate.notes
        if vae is None:
            notes.append(f"the tokenizer was taken from {vae_path}")
    elif tokenizer is not None:  # in the same file
        vae_path = path
    return DenseFiles(parts.transformer, tokenizer, path, vae_path, hints, parts.rest, notes, parts.family)


def _read_parts(path: Path) -> Parts:
    with problems_of(path):
        tensors = read_tensors(path)
        var, other = split_parts(tensors), split_parts(tensors, infinity.NAMES)
    text = other.transformer is not None or (var.transformer is None and var.tokenizer is None)
    return other if text and (other.transformer is not None or other.tokenizer is not None) else var


@contextmanager
def problems_of(path: Path) -> Iterator[None]:
    """Puts the path in front of the message of a CheckpointError that does not name it."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in error.message:
            raise
        raise CheckpointError(f"{path}: {error.message}", error.problems) from error


def guess_model(names: Iterable[str]) -> str | None:
    """What kind of model the names of tensors belong to, in words; None when nothing is recognised."""
    text = "\n".join(sorted(strip_wrappers(name) for name in names))
    for pattern, what in _GUESSES:
        if re.search(rf"^{pattern}", text, flags=re.MULTILINE):
            return what
    return None


def what_instead(names: Sequence[str]) -> str:
    """What tensors of these names are, when they are no VAR; a clause."""
    guess = guess_model(names)
    if guess:
        return f"it looks like {guess}"
    if not names:
        return "it holds no named tensors"
    return f"its {len(names)} tensors have unknown names ({', '.join(names[:3])}, ...)"


def locate(source: Path, vae: Path | None) -> tuple[Path, Path | None, Mapping[str, Any]]:
    """The files that a path and an optional tokenizer path mean: transformer, tokenizer (None: nothing lies about), and
    the config.json of the folder, or beside the file that is the folder's model (empty without one).

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
        return _in_folder(source, _MODEL), vae or _beside(source), hints
    return (source, vae or _beside(source.absolute().parent, source), _hints_beside(source))


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


def _problems(path: Path, module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Structure first; values only of tensors whose structure is right."""
    found = compare(module, tensors).problems() or nonfinite_problems(tensors)
    return [f"{path.name}: {problem}" for problem in found]
