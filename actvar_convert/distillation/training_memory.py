"""What distillation needs in memory, by arithmetic on shapes and recipe alone.

Activations are priced by constants that were measured on small models as bytes alive at the peak of a step, per pyramid
token, and rounded up: the dtype decides, not the size of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.conversion.conversion_memory import PROGRAM, MemoryEstimate, fullest, sampling_memory
from actvar_convert.distillation.lora import lora_targets
from actvar_convert.distillation.optimizers import hidden_matrices
from actvar_convert.distillation.stages import lora_rank, trainable_parameters
from actvar_convert.files.skeleton import empty_backbone
from actvar_convert.models.base import Config
from actvar_convert.models.families import logits_of
from actvar_convert.models.split import added
from actvar_convert.plan import Plans
from actvar_convert.recipe.schema import JointStage, Recipe, StageRecipe
from actvar_convert.system.device import DTYPES

FP32 = 4


class _Activations(NamedTuple):
    """Bytes per token: of a block and of what does not grow with depth, per channel; of the head, per code."""

    block: int
    head: int
    rest: int


_JOINT = {"fp32": _Activations(110, 30, 8), "bf16": _Activations(71, 30, 8), "fp16": _Activations(71, 30, 8)}
_LOCAL = {"fp32": _Activations(62, 0, 32), "bf16": _Activations(41, 0, 32), "fp16": _Activations(41, 0, 32)}


def estimate_distill(
    config: Config,
    tokenizer: Any,
    recipe: Recipe,
    *,
    processes: int = 1,
    sharded: bool = False,
    device: str = "cpu",
) -> MemoryEstimate:
    """Peak memory of ``distill`` on one device, teacher and student in fp32.

    With W_t and W_s the numbers of teacher and student, T those that a stage trains, B its batch, L tokens, D blocks, C
    width, V codes:

    - sampling (if something is trained, on data from the teacher): 4 (W_t + W_s), 2 W_t more if the recipe samples
      in half precision, and ``sampling_memory``.
    - a stage: weights 4 (W_t + W_s), in half precision 2 W_s more for the copies that autocast keeps, with low-rank
      updates 4 W_s more for the sums that stand in for the weights; gradients 4 T; AdamW 8 T, and 4 T while it steps;
      Muon 4 bytes for every number of its matrices instead, and 12 for every number of the largest while it steps;
      activations B L (a D C + h V + r C), with a, h, r bytes as in this file: in stage 2 every block keeps about 28 C
      numbers per token for its backward pass.

    Args:
        config, tokenizer: shape of the dense model; images are tokenised before anything is trained.
        recipe: batches, what trains, dtype.
        processes: those that share a batch, each on a device of its own.
        sharded: the student is split over them while it trains.
        device: its kind, which decides how many images are under way at once while a model samples.

    Raises:
        RecipeError: the recipe's budget is out of reach.
    """
    plans, default = recipe_plans(config, recipe)
    student = empty_backbone(config, Plans(plans, default))
    numbers = sum(tensor.numel() for tensor in student.state_dict().values())
    weights = {"program": PROGRAM, "weights of teacher and student": 2 * FP32 * numbers}
    phases = [MemoryEstimate("distill", "nothing", weights, ())]
    if recipe.distill.stage1.steps or recipe.distill.stage2.steps:
        phases.append(_data_phase("distill", config, tokenizer, recipe, weights, numbers, device))
    for name, stage, table in (("stage1", recipe.distill.stage1, _LOCAL), ("stage2", recipe.distill.stage2, _JOINT)):
        if stage.steps:
            own = stage.model_copy(update={"batch": -(-stage.batch // processes)})
            parts = {
                **weights,
                **_training(student, stage, recipe.dtype),
                **_forward(config, own, table[recipe.dtype]),
            }
            if sharded:
                parts |= _split(student, parts, processes)
            lower = (f"distill.{name}.batch", *_fewer(stage))
            phases.append(MemoryEstimate("distill", name, parts, lower))
    return fullest(*phases)


def _fewer(stage: StageRecipe) -> tuple[str, ...]:
    """What trains less in a stage."""
    return ("distill.stage2.trainable (experts or lora)",) if isinstance(stage, JointStage) else ()


def _data_phase(
    work: str,
    config: Config,
    tokenizer: Any,
    recipe: Recipe,
    weights: dict[str, int],
    numbers: int,
    device: str,
) -> MemoryEstimate:
    """Making the pyramids to train on, beside weights of which a model of ``numbers`` samples."""
    if recipe.data.images is not None:
        maps = {"feature maps": 6 * FP32 * recipe.data.batch * tokenizer.ch * tokenizer.image_size**2}
        return MemoryEstimate(work, "tokenising images", {**weights, **maps}, ("data.batch",))
    batch, itemsize = min(recipe.data.batch, recipe.data.pyramids), DTYPES[recipe.dtype].itemsize
    sampling = {
        **weights,
        "weights in half precision": 0 if itemsize == FP32 else itemsize * numbers,
        **sampling_memory(config, tokenizer, batch, itemsize, device),
    }
    return MemoryEstimate(work, "sampling from the teacher", sampling, ("data.batch",))


def _split(student: Any, parts: dict[str, int], processes: int) -> dict[str, int]:
    """The parts that get smaller when a student is split.

    Beside its share a process holds all weights of two blocks with their gradients, and all outside of the blocks.
    """
    numbers = sum(tensor.numel() for tensor in student.state_dict().values())
    block = max(sum(tensor.numel() for tensor in each.state_dict().values()) for each in student.blocks)
    gathered = 4 * block + 2 * (numbers - block * len(student.blocks))
    split = {name: parts[name] // processes for name in ("gradients", "optimiser")}
    return {
        **split,
        "weights of teacher and student": FP32 * (numbers + numbers // processes),
        "gathered weights and gradients": FP32 * gathered,
        "weights in half precision": min(parts["weights in half precision"], 2 * block),
    }


def _training(student: Any, stage: StageRecipe, dtype: str) -> dict[str, int]:
    numbers = sum(parameter.numel() for parameter in student.parameters())
    parameters = trainable_parameters(student, stage)
    trained = sum(parameter.numel() for parameter in parameters.values())
    matrices = (
        [each.numel() for each in hidden_matrices(parameters, added(student)).values()]
        if stage.optimizer == "muon"
        else []
    )
    updated = 0
    rank = lora_rank(stage)
    if rank is not None:
        shapes = [layer.weight.shape for layer in lora_targets(student)]
        trained += sum(rank * sum(shape) for shape in shapes)
        updated = sum(shape.numel() for shape in shapes)
    return {
        "gradients": FP32 * trained,
        "optimiser": FP32 * (3 * trained - 2 * sum(matrices) + 3 * max(matrices, default=0)),
        "weights in half precision": 0 if dtype == "fp32" else 2 * numbers,
        "weights with low-rank updates": FP32 * updated,
    }


def _forward(config: Config, stage: StageRecipe, per_token: _Activations) -> dict[str, int]:
    tokens = stage.batch * config.schedule.total
    return {
        "activations": tokens * config.width * (per_token.block * config.depth + per_token.rest),
        "logits": tokens * logits_of(config) * per_token.head,
    }
