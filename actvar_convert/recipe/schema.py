"""What a recipe may say: frozen models, one per section, every setting with its meaning, unit and range.

Nothing here reads files or knows a model; ``load`` reads, ``check`` compares with a model's shape.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from actvar_convert.errors import InputError
from actvar_convert.plan import GuidanceKind, SparsityPlan
from actvar_convert.recipe.shape import Shape
from actvar_convert.system.dtype_names import short_dtype
from actvar_convert.system.paths import expanded


def _written(path: str) -> str:
    """A path as the writer of a recipe means it."""
    try:
        return expanded(path)
    except InputError as error:
        raise ValueError(error.message) from error


PathText = Annotated[str, AfterValidator(_written)]
Dtype = Annotated[Literal["fp32", "bf16"], BeforeValidator(short_dtype)]
TimedDtype = Annotated[Literal["fp32", "bf16", "fp16"], BeforeValidator(short_dtype)]
WARMUP = "steps over which the learning rate rises; in a stage that is shorter it does not get to its full value"
Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1)]

Phase = Literal["convert", "train", "measure"]
"""What a setting decides: the model before any training, the training, or what is measured of the result."""

FEWEST_IMAGES = 20
"""Images of an evaluation below which a covariance, a split or a jackknife group would be empty."""


class Section(BaseModel):
    """Base of all sections: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CalibrationRecipe(Section):
    """The token pyramids whose activations are measured."""

    pyramids: int = Field(512, ge=1, description="token pyramids (images) that are measured")
    batch: int = Field(64, ge=1, description="pyramids in memory at once")


class ExpertsRecipe(Section):
    """How the neurons of every FFN become experts."""

    count: int = Field(16, ge=1, description="experts E per FFN; divides the hidden neurons H")
    clustering: Literal["kmeans", "gradient"] = Field(
        "kmeans",
        description="what groups neurons: activation profiles, each by itself or as large as it moves the model's "
        "predictions (measured by the search for a plan, else the FFN's output)",
    )
    compensation: Literal["none", "sequential"] = Field(
        "none",
        description="whether weights are refitted, by least squares, to make up for what is left out: not, or block "
        "after block on the states that the sparse model has: output weights of FFNs, output projections of attention, "
        "and the head. An export of such a model is no longer bit-equal to its source",
    )


class GateRecipe(Section):
    """How skipped tokens are filled in: by the update of the scale before and a low-rank map, both fitted."""

    rank: int = Field(
        16, ge=0, description="rank of the low-rank map of the reconstruction; 0: the previous scale's update alone"
    )


class BudgetRecipe(Section):
    """What the search for a plan may spend; unused when ``plans`` are given."""

    reduction: float = Field(
        0.22, gt=0, lt=1, description="share of the transformer's FLOPs, with guidance, that the plan saves"
    )
    plans: dict[str, Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        None, description="further named plans that the model carries, and the share that each saves"
    )
    guidance: GuidanceKind = Field(
        "paired",
        description="classifier-free guidance of the sparse model: paired runs every image with its class and without; "
        "folded runs it once and learns the combined predictions, which halves the FLOPs and fixes the strength. A "
        "folded model is of no use before stage 2 has trained it",
    )
    pyramids: int = Field(
        128, ge=1, description="calibration pyramids, at most all of them, on which the search measures sensitivity"
    )
    prefix_share: float = Field(
        0.5, ge=0, le=1, description="share of the active experts that every token runs; of a search, the least share"
    )
    gate_keep: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the tokens computed at gated scales; of a search, the least; 0: it may leave out whole "
        "blocks there; 1: no gate",
    )
    gate_scales: int = Field(1, ge=0, description="how many of the last scales are gated, or may be")


class DataRecipe(Section):
    """The token pyramids that distillation replays, and what they are made of."""

    images: PathText | None = Field(
        None,
        min_length=1,
        description="folder of images with one sub-folder per class, for the calibration too; null: the teacher's own "
        "samples",
    )
    rows: PathText | None = Field(
        None,
        min_length=1,
        description="file of the text rows of prompts, for the calibration and the evaluation too; of models that make "
        "images of text",
    )
    pyramids: int = Field(4096, ge=1, description="token pyramids (images) stored")
    null_share: float = Field(0.1, ge=0, le=1, description="share of the labels that is the null class")
    cfg: float | None = Field(None, ge=0, description="guidance of the teacher's samples; null: the model's own")
    batch: int = Field(64, ge=1, description="pyramids generated or tokenised at once")


Steps = Annotated[int, Field(ge=0, description="optimiser steps; 0 leaves the stage out")]
Rate = Annotated[float, Field(gt=0, description="peak learning rate")]
OptimizerName = Annotated[
    Literal["adamw", "muon"],
    Field(description="what takes the steps: AdamW, or Muon for the blocks' weight matrices and AdamW for the rest"),
]
PlanTurns = Literal["default", "random"]


class StageRecipe(Section):
    """How long a stage trains, and how. The defaults are those of stage 1: every FFN apart, on the teacher's inputs."""

    steps: Steps = 200
    batch: int = Field(32, ge=1, description="token pyramids per step")
    learning_rate: Rate = 1e-3
    warmup: int = Field(20, ge=0, description=WARMUP)
    optimizer: OptimizerName = "adamw"


class JointStage(StageRecipe):
    """Stage 2: all together against the teacher's logits. The defaults train everything but the routers."""

    steps: Steps = 400
    learning_rate: Rate = 3e-4
    trainable: Literal["none", "lora", "experts", "all"] = Field(
        "all", description="weights trained beside the gates: none, low-rank additions, experts, all"
    )
    lora_rank: int = Field(16, ge=1, description="rank of the low-rank additions, with trainable lora")
    gate: Literal["frozen", "train"] = Field("train", description="gates and reconstruction stay still, or train")


class DistillRecipe(Section):
    """Two-stage distillation from the dense model."""

    plans: PlanTurns = Field(
        "default",
        description="plans that the steps train: the default one, or all of the model by turns, in random order",
    )
    stage1: StageRecipe = Field(StageRecipe(), description="routers and experts, every FFN apart")
    stage2: JointStage = Field(JointStage(), description="gates and all the rest, jointly")


class EvaluateRecipe(Section):
    """How quality is measured, dense and sparse with the same seeds."""

    images: int = Field(5000, ge=FEWEST_IMAGES, description="images generated per seed for FID and its companions")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="seed of every set of images")
    held_out: int = Field(512, ge=2, description="teacher pyramids, apart from the training data, for KL and agreement")
    batch: int = Field(64, ge=1, description="images generated at once")
    reference: PathText | None = Field(
        None, description="real images for Inception features, a folder or an .npz; null: the bundled classifier judges"
    )


class BenchmarkRecipe(Section):
    """What is timed."""

    batches: tuple[Positive, ...] = Field((1, 16), min_length=1, description="images generated at once")
    dtypes: tuple[TimedDtype, ...] = Field(("fp32",), min_length=1, description="dtypes of the transformer")


class ChecksRecipe(Section):
    """Limits that a run has to keep; a run that breaks one ends with exit code 3."""

    max_flops_ratio: float | None = Field(None, gt=0, description="largest sparse / dense FLOPs of the transformer")
    max_kl: float | None = Field(None, ge=0, description="largest mean KL to the dense model, nats per token")
    max_fid_increase: float | None = Field(
        None, ge=0, description="largest rise of the FID, relative to the dense model's"
    )
    max_distance: float | None = Field(
        None,
        ge=0,
        description="largest mean distance of a picture to the dense model's of the same seed: root mean squared error "
        "of pixels in 0 to 1; needs no real images",
    )
    baseline: PathText | None = Field(
        None,
        description="an eval.json of an earlier run: neither the rise of the FID nor the KL may be worse than there "
        "beyond the measured noise",
    )


class Recipe(Section):
    """Everything that ``convert``, ``distill`` and ``run`` need to know beside the files."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the recipe and, under runs/, of the output folder"
    )
    description: str = Field("", description="what the recipe is for, in one line")
    model: PathText = Field(min_length=1, description="dense model: a bundled name, an official name, or a path")
    vae: PathText | None = Field(None, description="tokenizer file, if the model's file does not bring its own")
    shape: Shape = Field(Shape(), description="what the model's files do not tell of its shape")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of calibration, clustering and distillation")
    device: str | None = Field(None, description="cpu, cuda, cuda:N or mps; null: the GPU if there is one")
    dtype: Dtype = Field(
        "fp32",
        description="dtype in which the teacher samples, gradients are measured, forward passes of the distillation "
        "run (autocast), and both models generate for an evaluation; weights in training stay in fp32",
    )
    calibration: CalibrationRecipe = Field(
        CalibrationRecipe(), description="the token pyramids whose activations are measured"
    )
    experts: ExpertsRecipe = Field(ExpertsRecipe(), description="how the neurons of every FFN become experts")
    gate: GateRecipe = Field(GateRecipe(), description="how tokens are skipped and filled in")
    budget: BudgetRecipe = Field(
        BudgetRecipe(), description="what the search for a plan may spend; unused when plans are given"
    )
    plans: dict[str, SparsityPlan] | None = Field(
        None,
        min_length=1,
        description="named plans instead of a search; they state what gate says otherwise",
    )
    default_plan: str | None = Field(None, description="which of the plans a model starts with; null: the first")
    data: DataRecipe = Field(DataRecipe(), description="the token pyramids that distillation replays")
    distill: DistillRecipe = Field(DistillRecipe(), description="two-stage distillation from the dense model")
    evaluate: EvaluateRecipe = Field(EvaluateRecipe(), description="how quality is measured")
    benchmark: BenchmarkRecipe = Field(BenchmarkRecipe(), description="what is timed")
    checks: ChecksRecipe | None = Field(None, description="limits that a run has to keep, else exit code 3; null: none")


PHASES: dict[str, tuple[Phase, ...]] = {
    "name": ("convert",),
    "description": (),
    "model": ("convert",),
    "vae": ("convert",),
    "shape": ("convert",),
    "seed": ("convert", "train"),
    "device": (),
    "dtype": ("convert", "train", "measure"),
    "calibration": ("convert",),
    "experts": ("convert",),
    "gate": ("convert",),
    "budget": ("convert",),
    "plans": ("convert",),
    "default_plan": ("convert",),
    "data": ("convert", "train"),
    "distill": ("train",),
    "evaluate": ("measure",),
    "benchmark": ("measure",),
    "checks": ("measure",),
}
"""What every section decides. A folder keeps the name; calibration has the source and guidance of ``data``.

Whoever asks if a setting matters for something asks here.
"""


def deciding(recipe: Recipe, *phases: Phase) -> str:
    """JSON of the settings that decide any of the phases: equal for two recipes that come to the same there."""
    return recipe.model_dump_json(include={name for name, own in PHASES.items() if set(own) & set(phases)})


def settled() -> list[str]:
    """Sections that decide the conversion alone: once a model is converted they change nothing."""
    return [name for name, own in PHASES.items() if own == ("convert",) and name != "name"]
