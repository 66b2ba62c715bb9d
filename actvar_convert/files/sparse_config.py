"""config.json of a sparse folder: the format, the shapes, the plans, and where everything came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actvar_convert._version import __version__
from actvar_convert.errors import CheckpointError
from actvar_convert.files.infer import Overrides, messages
from actvar_convert.files.locate import SPARSE_FORMAT
from actvar_convert.files.tensors import digest_of, read_json, require_exists
from actvar_convert.files.upgrade import FORMAT_VERSION, upgraded
from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.system.atomic import finish_commit


class Provenance(BaseModel):
    """Where a sparse model came from; further fields are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    tool_version: str = Field(__version__, description="version of this package that wrote the folder")
    name: str | None = Field(None, description="bundled or published name of the dense source")
    source: str | None = Field(None, description="path of the dense source")
    source_sha256: str | None = Field(None, description="SHA-256 of the dense source")
    vae: str | None = Field(None, description="path of the tokenizer's file")
    vae_sha256: str | None = Field(None, description="SHA-256 of the tokenizer's file")
    heads: int | None = Field(None, description="attention heads that were given for the source")
    residual_ratio: float | None = Field(None, description="residual ratio that was given for its tokenizer")
    sides: tuple[int, ...] | None = Field(None, description="token pyramid that was given for the source")
    revision: str | None = Field(None, description="commit of the hub repository that the source is of")
    student: str | None = Field(None, description="of a distilled model: fingerprint of the one that it began as")
    recipe_sha256: str | None = Field(None, description="SHA-256 of recipe.yaml, with line ends as \\n")


class SamplingConfig(BaseModel):
    """The sampling that the model was measured with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cfg: float = Field(ge=0, allow_inf_nan=False)
    top_k: int = Field(ge=0)
    top_p: float = Field(ge=0, le=1)


class SparseConfig(BaseModel):
    """Everything about a sparse model except its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["actvar-sparse"] = SPARSE_FORMAT
    format_version: int = FORMAT_VERSION
    family: Literal["var"] = "var"
    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    sampling: SamplingConfig
    plans: dict[str, SparsityPlan] = Field(min_length=1)
    default_plan: str
    provenance: Provenance = Provenance()

    def problems(self) -> list[str]:
        """What contradicts itself: plans that do not fit the model, a default that is no plan, another tokenizer."""
        found = [
            f"plans.{name}: {line}" for name, plan in self.plans.items() for line in plan.problems(self.transformer)
        ]
        if self.default_plan not in self.plans:
            found.append(f"default_plan: {self.default_plan!r} is not among the plans {', '.join(self.plans)}")
        for field in ("vocab", "z_channels", "sides"):
            ours, theirs = getattr(self.transformer, field), getattr(self.tokenizer, field)
            if ours != theirs:
                found.append(f"{field}: transformer {ours}, tokenizer {theirs}")
        return found


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
    try:
        config = SparseConfig.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged or was edited. Restore it, or convert again:", messages(error)
        ) from error
    problems = config.problems()
    if problems:
        raise CheckpointError(f"{path} contradicts itself. Restore it, or convert again:", problems)
    return config


def provenance_of(origin: Mapping[str, str], **more: Any) -> Provenance:
    """Provenance of what is made from a dense model.

    Args:
        origin: ``VARModel.origin`` of the dense model; its files are read to compute their hashes.
        more: further fields.
    """
    path, vae = origin.get("path"), origin.get("vae")
    return Provenance(
        name=origin.get("name"),
        source=path,
        source_sha256=digest_of(Path(path)) if path else None,
        vae=vae,
        vae_sha256=digest_of(Path(vae)) if vae else None,
        revision=origin.get("revision"),
        **Overrides.from_origin(origin)._asdict(),
        **more,
    )


def recipe_digest(text: bytes) -> str:
    """SHA-256 of a recipe's text that does not depend on how lines end."""
    return hashlib.sha256(text.replace(b"\r\n", b"\n")).hexdigest()
