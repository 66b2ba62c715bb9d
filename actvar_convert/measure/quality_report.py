"""The values of a quality report, and its JSON form: ``actvar.eval/1``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from actvar_convert.errors import InputError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the distances of pairs."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class SamplingSettings(_Value):
    """How the images were sampled."""

    cfg: float | tuple[float, ...] = Field(description="strength of guidance at the last scale, or at every scale")
    top_k: int = Field(description="0: all tokens")
    top_p: float = Field(description="0: all tokens")
    tau: float | tuple[float, ...] | None = Field(None, description="temperature, of all scales or of every scale")
    guidance_layer: int | None = Field(None, description="block after which states are guided in place of logits")
    chunk: int = Field(description="images sampled from one generator; equal images need an equal chunk")

    @model_serializer(mode="wrap")
    def _said(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not given."""
        return {name: value for name, value in plain(self).items() if value is not None}


class Paired(_Value):
    """One measure of both models: means over the seed sets, and the value of each, in the order of ``seeds``."""

    dense: float
    sparse: float
    dense_per_seed: tuple[float, ...]
    sparse_per_seed: tuple[float, ...]


class FidQuality(Paired):
    """Fréchet distance to the real images in the extractor's features."""

    tokenizer: float | None = Field(description="of reconstructions of the real images; None if it is not known")
    increase: float = Field(description="mean over seed sets of (sparse - dense) / dense")
    standard_error: float | None = Field(description="of ``increase``, from its spread over seed sets; None with one")
    jackknife_error: float = Field(description="of ``increase``, from leaving out groups of images in each seed set")

    @property
    def noise(self) -> float:
        """The larger of the two standard errors: few seed sets estimate their own spread poorly."""
        return max(self.standard_error or 0.0, self.jackknife_error)


class KLQuality(_Value):
    """KL(dense || sparse) under teacher forcing, nats per token."""

    mean: float = Field(description="over all tokens of the held-out pyramids")
    per_scale: tuple[float, ...]
    standard_error: float = Field(description="of ``mean``, over pyramids")
    pyramids: int


class AgreementQuality(_Value):
    """Share of held-out tokens for which both models find the same code the likeliest."""

    top1: float
    per_scale: tuple[float, ...]
    standard_error: float | None = Field(None, description="of ``top1``, over pyramids; None in older reports")


class DistanceSpread(_Value):
    """How one kind of distance is distributed over the pairs."""

    mean: float
    standard_error: float = Field(description="of ``mean``, over pairs")
    quantiles: tuple[float, ...] = Field(description="at 5, 25, 50, 75 and 95 % of the pairs")


class WorstPair(_Value):
    """A pair of pictures that lies far apart."""

    seed: int = Field(description="of the set of images")
    index: int = Field(description="in the set, from 0")
    label: int | None = Field(description="None if something else conditions the images")
    pixel: float
    feature: float | None


class PairDistances(_Value):
    """Distance of each picture to the dense model's of the same seed and label; no real images are needed."""

    pairs: int
    pixel: DistanceSpread = Field(description="root mean squared error of pixels in [0, 1]")
    feature: DistanceSpread | None = Field(description="1 - cosine of features; None without an extractor")
    worst: tuple[WorstPair, ...] = Field(description="largest pixel distance first")

    @property
    def psnr(self) -> float | None:
        """Peak signal-to-noise ratio of the mean pixel distance, dB; None if the pictures are equal."""
        return -20 * math.log10(self.pixel.mean) if self.pixel.mean > 0 else None


class RoutingLoad(_Value):
    """What the router of one block chose at one scale, over the computed tokens of the held-out pyramids, each of which
    runs with its class and, if guided predictions are compared, without."""

    block: int
    scale: int
    tokens: int = Field(description="that were seen")
    load: tuple[float, ...] = Field(description="share of the tokens that run each expert after the prefix")
    active: int = Field(description="experts after the prefix that a token runs")
    balance: float = Field(description="entropy of the load over its largest: 1 all alike, 0 one expert alone")


class PlanQuality(_Value):
    """Everything measured for one plan; without images, what is measured on them is None."""

    fid: FidQuality | None = None
    inception_score: Paired | None = None
    precision: Paired | None = Field(None, description="None also if the reference has no feature vectors")
    recall: Paired | None = Field(None, description="as precision")
    label_agreement: Paired | None = Field(
        None, description="share of images classified as their label; None also if the extractor knows other classes"
    )
    kl: KLQuality
    guided_kl: KLQuality | None = Field(
        None,
        description="of guided predictions, which images are sampled from; None if nothing is guided or guidance is "
        "folded in, and in older reports",
    )
    agreement: AgreementQuality
    distances: PairDistances | None = Field(
        None, description="over the first chunks of the first seed set; None also in older reports"
    )
    routing: tuple[RoutingLoad, ...] = Field((), description="by block and scale; empty if nothing is routed")


class QualityReport(PlanQuality):
    """Quality of the plan in use; of further plans under ``plans``."""

    format: Literal["actvar.eval/1"] = Field("actvar.eval/1", alias="schema")
    images: int = Field(description="judged per model and seed set; 0: none were")
    seeds: tuple[int, ...]
    sampling: SamplingSettings
    dtype: str = Field(description="that the images were generated in; KL and agreement are never cast")
    extractor: str | None = Field(description="what judged the images; None if none were measured")
    reference: str | None = Field(
        None, description="identifies the real images that were compared with; None also in older reports"
    )
    neighbours: int | None = Field(None, description="k of precision and recall; None in older reports")
    plan: str | None = Field(description="None for a model without plans")
    plans: dict[str, PlanQuality] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The report as JSON, schema ``actvar.eval/1``."""
        return self.model_dump_json(by_alias=True, indent=2)


def load_quality(path: Path) -> QualityReport:
    """A stored ``eval.json``.

    Raises:
        InputError: the file is missing or is no such report.
    """
    try:
        return QualityReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the eval.json of an evaluation") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        raise InputError(f"{path}: no eval.json of this version; evaluate anew", problems) from error
