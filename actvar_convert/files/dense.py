"""Dense models in the files that people have: which files, whose tensors, and the model that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError, counted, explain_os_errors
from actvar_convert.files import infinity
from actvar_convert.files.contents import Contents, steadily
from actvar_convert.files.layout import (
    Parts,
    agreement_problems,
    assumed_of_tokenizer,
    assumed_of_transformer,
    infer_tokenizer,
    infer_transformer,
    missing_blocks,
    published_sampling,
    split_parts,
    strip_wrappers,
    told_of_tokenizer,
)
from actvar_convert.files.skeleton import (
    assign,
    common_dtype,
    compare,
    empty_backbone,
    empty_tokenizer,
    read_values,
)
from actvar_convert.files.sparse_folder import is_sparse_folder
from actvar_convert.files.tensors import (
    INDEX_SUFFIX,
    listed_files,
    open_tensors,
    read_json,
    require_exists,
    several_weights,
    weight_files,
)
from actvar_convert.models.base import Sampling
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import MAX_TOKENS
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
    """The tensors of a dense model, found and named but neither checked nor read.

    Attributes:
        transformer, tokenizer: meta tensors by their reference names; None if there is none. ``lvl_1L`` has values.
        contents: reads the values of both.
        path, vae: the files or indices of shards that they come from; vae None if there is no tokenizer.
        hints: the config.json of the folder, or beside the file that is the folder's model; empty without one.
        rest: names that belong to neither part.
        notes: choices that were made, one sentence each.
        family: whose names the tensors have.
    """

    transformer: dict[str, Tensor] | None
    tokenizer: dict[str, Tensor] | None
    contents: Contents
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

    Nothing in the files is executed. One tensor after another is read, into memory of its own, and converted; what is
    not the model's is not read. The files may be written to afterwards; a model is what they were at one moment.

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
    known = shape_of(shape)

    def read() -> Model:
        return build_dense(read_dense(Path(source), None if vae is None else Path(vae), known.weights), known, dtype)

    model = steadily(read)
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
    keep = dtype == "keep"
    wanted = dtype if isinstance(dtype, torch.dtype) else torch.float32
    wrong = []
    for file, module, tensors, usual in (
        (path, transformer, shaped.weights, wanted),
        (tokenizer_path, tokenizer, shaped.vae_weights, torch.float32),
    ):
        of = common_dtype(tensors.values()) if keep else usual
        found = compare(module, tensors).problems()
        if not found:  # structure first; values only of tensors whose structure is right
            values, found = read_values(files.contents, tensors, of)
            assign(module, values, of)
        wrong += [f"{file.name}: {problem}" for problem in found]
    if wrong:
        raise CheckpointError(
            f"{path} cannot be loaded as {words.a} {words.model}; get it from its source again:", wrong
        )
    model = Model(transformer, tokenizer, sampling or shaped.sampling)
    model.eval()
    model.origin = {"path": str(path.absolute()), "vae": str(tokenizer_path.absolute())}
    model.moments = {str(file.absolute()): stamp for file, stamp in files.contents.stamps.items()}
    model.notes = [*files.notes, *shaped.notes]
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
        shape, told = infer_tokenizer(files.tokenizer), told_of_tokenizer(known, files.hints)
        tokenizer = shape.config(own.sides, told)
    disagreements = agreement_problems(own, shape)
    if disagreements:
        raise CheckpointError(
            f"the transformer {path} and the tokenizer {tokenizer_path} do not belong together; give the VQVAE that "
            "the transformer was trained with:",
            disagreements,
        )
    notes = [
        *assumed_of_transformer(own, files.transformer, known, files.hints),
        *assumed_of_tokenizer(tokenizer, told, own),
    ]
    return Shaped(own, tokenizer, files.transformer, files.tokenizer, published_sampling(own), notes)


def read_dense(source: Path, vae: Path | None, weights: str | None = None) -> DenseFiles:
    """Finds the tensors of a dense model without reading values.

    Args:
        weights: see ``split_parts``; of a tokenizer's own file too, if something there has the name.

    Raises:
        InputError, CheckpointError: see load_dense.
    """
    path, vae_path, hints = locate(source, vae)
    contents = open_tensors(path)
    parts = _parts_of(path, contents.tensors, weights)
    tokenizer, notes = parts.tokenizer, [*contents.notes, *parts.notes]
    older = [file.name for file in _named_files(source, _MODEL) if file != path] if source.is_dir() else []
    if older:
        notes.append(f"{path.name} was taken, the newest, and not {' or '.join(older)}; to take that, give its path")
    if parts.transformer is not None and vae_path is not None and (vae is not None or tokenizer is None):
        beside, words = open_tensors(vae_path), _WORDS[parts.family]
        contents.include(beside)
        separate = _parts_of(vae_path, beside.tensors)
        if weights is not None and separate.notes:
            with suppress(InputError):
                separate = _parts_of(vae_path, beside.tensors, weights)
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
        notes += [*beside.notes, *(f"{vae_path.name}: {note}" for note in separate.notes)]
        if vae is None:
            notes.append(f"the tokenizer was taken from {vae_path}")
    elif tokenizer is not None:  # in the same file
        vae_path = path
    transformer = parts.transformer
    level = None if transformer is None else transformer.get("lvl_1L")
    if transformer is not None and level is not None and level.numel() <= MAX_TOKENS:
        transformer |= contents.read({"lvl_1L": level})
    return DenseFiles(transformer, tokenizer, contents, path, vae_path, hints, parts.rest, notes, parts.family)


def _parts_of(path: Path, tensors: Mapping[str, Tensor], weights: str | None = None) -> Parts:
    """The parts of a checkpoint of whatever family; ``weights`` as for ``split_parts``."""
    with problems_of(path):
        var, other = split_parts(tensors), split_parts(tensors, names=infinity.NAMES)
        text = other.transformer is not None or (var.transformer is None and var.tokenizer is None)
        if text and (other.transformer is not None or other.tokenizer is not None):
            return other if weights is None else split_parts(tensors, weights, infinity.NAMES)
        return var if weights is None else split_parts(tensors, weights)


@contextmanager
def problems_of(path: Path) -> Iterator[None]:
    """Puts the path in front of the message of an InputError that does not name it."""
    try:
        yield
    except InputError as error:
        if str(path) in error.message:
            raise
        raise type(error)(f"{path}: {error.message}", error.problems) from error


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
    """The hints of the folder of a file, if giving the folder would mean this file, or this or another of its name."""
    folder = source.absolute().parent
    try:
        named = _named_files(folder, _MODEL)
        meant = [file.name for file in named] or [_in_folder(folder, _MODEL).name]
    except InputError:
        return {}
    return _hints(folder) if source.name in meant else {}


def _named_files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """The files of the first stem that a folder has any of."""
    return next((files for stem in stems if (files := weight_files(folder, stem))), [])


def _in_folder(folder: Path, stems: tuple[str, ...]) -> Path:
    named = _named_files(folder, stems)
    if named:
        return _newest(folder, named)
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


def _newest(folder: Path, files: Sequence[Path]) -> Path:
    """The file that was written last, of an index with all that it lists: what lies beside it is of an earlier time.

    Raises:
        CheckpointError: several have that time.
    """
    written = {file: max(part.stat().st_mtime_ns for part in listed_files(file)) for file in files}
    newest = [file for file in files if written[file] == max(written.values())]
    if len(newest) > 1:
        raise several_weights(folder, files)
    return newest[0]


def _beside(folder: Path, source: Path | None = None) -> Path | None:
    """The tokenizer in a folder: the only file called ``vae*``."""
    named = weight_files(folder, "vae") or [file for file in _weight_files(folder) if file.name.startswith("vae")]
    found = named[0] if len(named) == 1 else None
    return None if source is not None and found == source.absolute() else found


def _weight_files(folder: Path) -> list[Path]:
    with explain_os_errors("read", folder):
        return sorted(file for file in folder.iterdir() if file.name.endswith(_WEIGHT_SUFFIXES) and file.is_file())
