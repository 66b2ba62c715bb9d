"""Sparse folders: the configuration, weights and recipe of a sparse model, written whole or not at all, read with
everything checked."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
)
from torch import Tensor, nn

from actvar_convert._version import __version__
from actvar_convert.errors import CheckpointError, InputError, RecipeError, explain_os_errors
from actvar_convert.files.contents import Changed, Contents, stamp_of, steadily, unchanged
from actvar_convert.files.layout import DERIVED_SUFFIXES, messages
from actvar_convert.files.skeleton import (
    assign,
    compare,
    empty_backbone,
    empty_tokenizer,
    nonfinite_problems,
    read_values,
)
from actvar_convert.files.tensors import (
    digest_of,
    open_tensors,
    read_json,
    require_exists,
    size_of,
    weight_file,
    write_weights,
)
from actvar_convert.files.upgrade import FORMAT_VERSION, Outdated, upgraded, upgraded_tensors
from actvar_convert.models.base import Sampling
from actvar_convert.models.families import FAMILIES
from actvar_convert.models.model import Model
from actvar_convert.models.schedule import Config
from actvar_convert.models.split import plans_of, stored_state
from actvar_convert.plan import Plans, SparsityPlan
from actvar_convert.recipe.shape import Shape, parse_shape
from actvar_convert.recipe.yaml_text import read_yaml
from actvar_convert.system.atomic import (
    COMMIT,
    finish_commit,
    is_plain_name,
    replacing_files,
    require_writable,
    write_whole,
)
from actvar_convert.system.device import require_space

SPARSE_FORMAT: Final = "actvar-sparse"

SHARD_BYTES = 5_000_000_000
OWNED = (
    "config.json",
    "recipe.yaml",
    *(f"{stem}{ending}" for stem in ("model", "vae") for ending in (".safetensors", "-*-of-*.safetensors")),
    *(f"{stem}.safetensors.index.json" for stem in ("model", "vae")),
)
"""Files that belong together; everything else in a sparse folder may be edited and deleted freely."""

REPORTS = (
    *("flops.json", "eval.json", "benchmark.json", "metrics.jsonl"),
    *("samples.png", "report.html", "README.md"),
)
"""What is written about a model, beside it; these go when another model takes its place."""


class Provenance(BaseModel):
    """Where a sparse model came from; further fields are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    tool_version: str = Field(__version__, description="version of this package that wrote the folder")
    name: str | None = Field(None, description="bundled or published name of the dense source")
    source: str | None = Field(None, description="path of the dense source")
    source_sha256: str | None = Field(None, description="SHA-256 of the dense source")
    vae: str | None = Field(None, description="path of the tokenizer's file")
    vae_sha256: str | None = Field(None, description="SHA-256 of the tokenizer's file")
    shape: Shape | None = Field(None, description="shape that was given for the dense source")
    revision: str | None = Field(None, description="commit of the hub repository that the source is of")
    student: str | None = Field(None, description="of a distilled model: fingerprint of the one that it began as")
    recipe_sha256: str | None = Field(None, description="SHA-256 of recipe.yaml, with line ends as \\n")


_Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_ByScale = _Strength | tuple[_Strength, ...]


class SamplingConfig(BaseModel):
    """The sampling that the model was measured with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cfg: _ByScale
    top_k: int = Field(ge=0)
    top_p: float = Field(ge=0, le=1)
    tau: _ByScale | None = None
    guidance_layer: int | None = None

    @model_serializer(mode="wrap")
    def _said(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not given."""
        return {name: value for name, value in plain(self).items() if value is not None}


class SparseConfig(BaseModel):
    """Everything about a sparse model except its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["actvar-sparse"] = SPARSE_FORMAT
    format_version: int = FORMAT_VERSION
    family: str
    transformer: SerializeAsAny[BaseModel]
    tokenizer: SerializeAsAny[BaseModel]
    sampling: SamplingConfig
    plans: dict[str, SparsityPlan] = Field(min_length=1)
    default_plan: str
    provenance: Provenance = Provenance()
    sha256: str | None = Field(None, description="SHA-256 of all else, see ``config_digest``")

    @field_validator("family")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FAMILIES:
            raise ValueError(f"{name!r} is unknown to this version, which has {', '.join(FAMILIES)}")
        return name

    def problems(self) -> list[str]:
        """What contradicts itself: plans that do not fit the model, a default that is no plan, another tokenizer."""
        found = [
            f"plans.{name}: {line}"
            for name, plan in self.plans.items()
            for line in plan.problems(cast(Config, self.transformer))
        ]
        if self.default_plan not in self.plans:
            found.append(f"default_plan: {self.default_plan!r} is not among the plans {', '.join(self.plans)}")
        for field in ("vocab", "z_channels", "sides", "bits", "maps"):
            there = all(hasattr(part, field) for part in (self.transformer, self.tokenizer))
            ours, theirs = getattr(self.transformer, field, None), getattr(self.tokenizer, field, None)
            if there and ours != theirs:
                found.append(f"{field}: transformer {ours}, tokenizer {theirs}")
        return found


@functools.cache
def _config_type(family: str) -> type[SparseConfig]:
    """The configuration of sparse models of a family; of one that is unknown, what refuses it."""
    if family not in FAMILIES:
        return SparseConfig
    own = FAMILIES[family]
    shapes: dict[str, Any] = {"transformer": (own.config_type, ...), "tokenizer": (own.tokenizer_config_type, ...)}
    return create_model("SparseConfig", __base__=SparseConfig, **shapes)


def save_sparse(
    model: Model,
    folder: str | Path,
    *,
    provenance: Provenance | Mapping[str, Any] | None,
    recipe_text: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes a sparse folder, or replaces the model in an existing one and its reports, and leaves other files alone.

    Args:
        model: what to write; the active plan becomes the default one.
        folder: its parents are created.
        provenance: where the model came from (see ``provenance_of``); version and recipe hash are filled in. None: by
            ``model.origin``.
        recipe_text: the resolved recipe in YAML.
        extra_files: reports and cards to appear together with the model, by name.

    Returns:
        the folder.

    Raises:
        InputError: the folder cannot be written or holds something else, or weights are not finite. Nothing is left
            behind or changed then.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    recipe = recipe_text.encode()
    config = _config(model, provenance, recipe)
    problems = [*config.problems(), *(f"extra file {name!r}" for name in extra_files or {} if not _free_name(name))]
    if problems:
        raise InputError(f"cannot write {folder}:", problems)
    transformer, tokenizer = _stored(model.transformer), _stored(model.tokenizer)
    spoilt = nonfinite_problems({**transformer, **{f"tokenizer: {name}": own for name, own in tokenizer.items()}})
    if spoilt:
        raise InputError(f"cannot write {folder}: a model with such weights could not be read again.", spoilt)
    require_space(folder, size_of(transformer) + size_of(tokenizer) + sum(map(len, (extra_files or {}).values())))
    with replacing_files(folder, (*OWNED, *REPORTS)) as staging:
        write_weights(staging, "model", transformer, SHARD_BYTES)
        write_weights(staging, "vae", tokenizer, SHARD_BYTES)
        (staging / "recipe.yaml").write_bytes(recipe)
        content = json.loads(config.model_dump_json())
        shape = content["provenance"]["shape"] or {}
        content["provenance"]["shape"] = {name: value for name, value in shape.items() if value is not None} or None
        content["sha256"] = config_digest(content)
        (staging / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, data in (extra_files or {}).items():
            (staging / name).write_bytes(data)
    return folder


def load_sparse(folder: str | Path, plan: str | None = None, *, dtype: torch.dtype | None = None) -> Model:
    """A sparse model from its folder, with every tensor's name, shape and finiteness checked.

    Args:
        folder: as written by ``save_sparse``; reports and cards in it may be missing or edited.
        plan: name of the plan to activate; None: the default.
        dtype: of the transformer's weights; None: float32.

    Raises:
        InputError: no such folder, or no such plan.
        CheckpointError: config, weights, tokenizer or recipe are missing, damaged or do not fit; all problems at once.
    """
    return steadily(lambda: _load_sparse(Path(folder), plan, dtype or torch.float32))


def _load_sparse(folder: Path, plan: str | None, dtype: torch.dtype) -> Model:
    require_exists(folder)
    finish_commit(folder)
    path = folder / "config.json"
    with unchanged(path) if path.is_file() else nullcontext():
        config = checked_config(folder)
        if plan is not None and plan not in config.plans:
            raise InputError(f"{folder} has no plan {plan!r}; it has {', '.join(config.plans)}.")
        transformer, tokenizer, plans = sparse_skeleton(config)
        contents, weights, vae_weights = open_sparse_weights(folder)
        parts = (("model", transformer, weights, dtype), ("vae", tokenizer, vae_weights, torch.float32))
        problems = [f"{stem}: {line}" for stem, own, given, _ in parts for line in compare(own, given).problems()]
        if not problems:
            for stem, own, given, of in parts:
                values, spoilt = read_values(contents, given, of)
                problems += [f"{stem}: {line}" for line in (*spoilt, *permutation_problems(values))]
                assign(own, values, of)
        if problems:
            raise CheckpointError(
                f"the weights in {folder} are damaged or of another model. Restore them from a copy, or convert again:",
                problems,
            )
        if (folder / COMMIT).is_dir():
            raise Changed(folder)
    sampling = Sampling(**config.sampling.model_dump())
    model = Model(transformer, tokenizer, sampling, plans)
    model.eval()
    model.origin = {"path": str(folder.absolute())}
    if plan is not None:
        model.use_plan(plan)
    return model


def refuse_foreign(folder: str | Path) -> None:
    """Checks that a sparse folder may be written at a place: there is nothing yet, an empty folder, or a sparse one.

    Hidden files do not count.

    Raises:
        InputError: a file is in the way, the folder holds something else, or nothing can be written there.
    """
    folder = Path(folder)
    with explain_os_errors("look into", folder):
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not existing.is_dir():
            raise InputError(
                f"cannot write the folder {folder}: {existing} is a file and in the way. Choose another name."
            )
        ours = existing != folder or is_sparse_folder(folder) or (folder / COMMIT).is_dir()
        if not ours and (folder / "config.json").exists():
            raise InputError(f"{folder} holds another model (its config.json is not ours). Choose another folder.")
        if not ours and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(
                f"{folder} exists and is not the folder of a sparse model. Move it away, or choose another with --out."
            )
    require_writable(folder)


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


def read_sparse_config(folder: Path) -> SparseConfig:
    """The configuration of a sparse folder, after finishing a save that was interrupted while it moved its files.

    Raises:
        InputError: no such folder.
        CheckpointError: config.json is missing, damaged, of a newer version, or contradicts itself.
    """
    require_exists(folder)
    finish_commit(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json, without which its weights mean nothing. Restore it.")
    content = read_json(path)
    if content.get("format") != SPARSE_FORMAT:
        raise CheckpointError(
            f"{path} is not the configuration of a sparse model: its format is not {SPARSE_FORMAT!r}."
        )
    content = upgraded(path, content)
    digest = content.get("sha256")
    own = None if digest is None else config_digest(content)
    try:
        # as JSON: there a list is a tuple, and all else has to be of its kind, a number no text
        config = _config_type(str(content.get("family"))).model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged or was edited. Restore it, or convert again:", messages(error)
        ) from error
    problems = config.problems()
    if own != digest and not problems:
        raise CheckpointError(f"{path} was changed since the model was made (its SHA-256 differs). Restore it.")
    if problems:
        raise CheckpointError(f"{path} contradicts itself. Restore it, or convert again:", problems)
    return config


def checked_config(folder: Path) -> SparseConfig:
    """The configuration of a sparse folder of which nothing is missing or cut short; no weight is read.

    Raises:
        InputError: no such folder.
        CheckpointError: what is wrong with config, recipe, weights and tokenizer, all problems at once.
    """
    problems: list[str] = []
    config: SparseConfig | None = None
    try:
        config = read_sparse_config(folder)
    except Outdated:
        raise
    except CheckpointError as error:
        problems += [error.message, *error.problems]
    problems += _recipe_problems(folder / "recipe.yaml", config.provenance.recipe_sha256 if config else None)
    try:
        open_sparse_weights(folder)
    except (Outdated, Changed):
        raise
    except CheckpointError as error:
        problems += error.problems
    if problems or config is None:
        raise CheckpointError(f"{folder} cannot be used. Restore it from a copy, or convert again:", problems)
    return config


def read_provenance(folder: str | Path) -> Provenance:
    """Where the model of a sparse folder came from.

    Raises:
        InputError, CheckpointError: see load_sparse.
    """
    return read_sparse_config(Path(folder)).provenance


def provenance_of(
    origin: Mapping[str, str], moments: Mapping[str, tuple[int, ...]] | None = None, **more: Any
) -> Provenance:
    """Provenance of what is made from a dense model.

    Args:
        origin, moments: of the dense model; its files are read to compute their hashes. A hash is left out if a file is
            not what it was when the weights were read.
        more: further fields.
    """
    path, vae = origin.get("path"), origin.get("vae")

    def as_read() -> bool:
        return all(Path(file).exists() and stamp_of(Path(file)) == stamp for file, stamp in (moments or {}).items())

    def digest(file: str | None) -> str | None:
        found = digest_of(Path(file)) if file and as_read() else None
        return found if as_read() else None

    return Provenance(
        name=origin.get("name"),
        source=path,
        source_sha256=digest(path),
        vae=vae,
        vae_sha256=digest(vae),
        revision=origin.get("revision"),
        shape=parse_shape(origin["shape"]) if "shape" in origin else None,
        **more,
    )


def update_file(folder: str | Path, name: str, data: bytes) -> Path:
    """Writes a report, picture or card into a sparse folder, whole or not at all; returns its path.

    Raises:
        InputError: the name is that of a file of the model, or the file cannot be written.
    """
    if not _free_name(name):
        raise InputError(f"{name!r} cannot be the name of a report in a sparse folder. Use a plain, other file name.")
    path = Path(folder) / name
    with explain_os_errors("write", path):
        write_whole(path, data)
    return path


def open_sparse_weights(folder: Path) -> tuple[Contents, dict[str, Tensor], dict[str, Tensor]]:
    """What reads values, and the tensors of the transformer and of the tokenizer by name, without values.

    Raises:
        CheckpointError: weights are missing or damaged, all problems at once; or they use what is no longer there.
    """
    problems: list[str] = []
    found: list[Contents] = []
    for stem, what in (("model", "the weights of the transformer"), ("vae", "the weights of the tokenizer")):
        try:
            file = weight_file(folder, stem)
            if file is None:
                problems.append(f"{stem}.safetensors, {what}, is missing")
            else:
                found.append(open_tensors(file))
        except Changed:
            raise
        except InputError as error:
            problems += [error.message, *error.problems]
    if problems:
        raise CheckpointError(f"{folder} is not complete. Restore it from a copy, or convert again:", problems)
    transformer, tokenizer = found
    contents = Contents()
    contents.include(transformer)
    contents.include(tokenizer)
    return contents, upgraded_tensors(folder, transformer), tokenizer.tensors


def sparse_skeleton(config: SparseConfig) -> tuple[Any, Any, Plans]:
    """Backbone and tokenizer of a sparse model, whose weights have shapes but no memory, and its plans.

    Raises:
        CheckpointError: the plans cannot be executed by one model.
    """
    try:
        plans = Plans(config.plans, config.default_plan)
        transformer = empty_backbone(config.transformer, plans)
    except RecipeError as error:
        raise CheckpointError(f"config.json: {error.message}", error.problems) from error
    return transformer, empty_tokenizer(config.tokenizer), plans


def permutation_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Blocks whose ``ffn.permutation`` is not a reordering of all neurons."""
    return [
        f"{name} is not a permutation of its {len(order)} neurons"
        for name, order in tensors.items()
        if name.endswith("ffn.permutation") and not torch.equal(order.sort().values, torch.arange(len(order)))
    ]


def recipe_digest(text: bytes) -> str:
    """SHA-256 of a recipe's text that does not depend on how lines end."""
    return hashlib.sha256(text.replace(b"\r\n", b"\n")).hexdigest()


def config_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a config.json's values but for this one; spaces, line ends and order do not count."""
    values = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _recipe_problems(path: Path, digest: str | None) -> list[str]:
    if not path.is_file():
        return ["recipe.yaml, the recipe that made the model, is missing"]
    with explain_os_errors("read", path):
        data = path.read_bytes()
    try:
        content = read_yaml(data.decode())
    except ValueError as error:
        return [f"recipe.yaml is not valid YAML: {error}"]
    if not isinstance(content, dict):
        return ["recipe.yaml is empty" if content is None else "recipe.yaml does not hold a mapping of settings"]
    if digest is not None and recipe_digest(data) != digest:
        return ["recipe.yaml was changed or cut short since the model was made (its SHA-256 differs)"]
    return []


def _config(model: Model, provenance: Provenance | Mapping[str, Any] | None, recipe: bytes) -> SparseConfig:
    if provenance is None:
        given = provenance_of(model.origin, model.moments)
    else:
        given = provenance if isinstance(provenance, Provenance) else Provenance(**provenance)
    sampling = model.sampling
    return SparseConfig(
        family=model.family.name,
        transformer=model.config,
        tokenizer=model.tokenizer.config,
        sampling=SamplingConfig(**sampling.settings),
        plans=plans_of(model).named,
        default_plan=plans_of(model).name,
        provenance=given.model_copy(
            update={"tool_version": Provenance().tool_version, "recipe_sha256": recipe_digest(recipe)}
        ),
    )


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of a module that a folder keeps: all but those that follow from the configuration."""
    return {name: t for name, t in stored_state(module).items() if not name.endswith(DERIVED_SUFFIXES)}


def _free_name(name: str) -> bool:
    return is_plain_name(name) and not any(Path(name).match(pattern) for pattern in OWNED)
