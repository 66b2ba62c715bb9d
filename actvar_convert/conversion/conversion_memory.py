"""What a conversion needs in memory, by arithmetic on shapes and recipe alone, and the check before any work.

An estimate is the sum of what exists together in the fullest phase, in bytes. It leaves out what the allocator wastes
and what a library keeps for itself beyond PROGRAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from actvar_convert.conversion.activations import Wanted
from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.conversion.clustering import PROFILES
from actvar_convert.conversion.converter import TOKENS_PER_SCALE, wanted_of
from actvar_convert.conversion.least_squares import CHUNK
from actvar_convert.conversion.search import TOKENS_PER_SCALE as SEARCH_TOKENS
from actvar_convert.conversion.search import searches
from actvar_convert.conversion.sensitivity import TOKENS as MEASURED_TOKENS
from actvar_convert.errors import InputError
from actvar_convert.files.skeleton import empty_backbone
from actvar_convert.models.base import Config
from actvar_convert.models.families import logits_of
from actvar_convert.models.model import images_at_once
from actvar_convert.plan import Plans
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.device import DTYPES, free_memory_bytes, memory_text

PROGRAM = 450_000_000
"""Interpreter and libraries: torch, scikit-learn and SciPy, once they are imported."""


class MemoryEstimate(NamedTuple):
    """The fullest phase of some work.

    Attributes:
        work: what is done.
        phase: the phase that needs most.
        parts: bytes by what holds them in that phase.
        lower: settings of the recipe that lower the need of that phase, the strongest first.
    """

    work: str
    phase: str
    parts: Mapping[str, int]
    lower: tuple[str, ...]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def fullest(*phases: MemoryEstimate) -> MemoryEstimate:
    """The phase that needs most."""
    return max(phases, key=lambda phase: phase.total)


def sampling_memory(config: Config, tokenizer: Any, batch: int, itemsize: int, device: str = "cpu") -> dict[str, int]:
    """Bytes that ``generate_tokens`` needs beside the weights, of which it keeps no more images B under way at once
    than ``GENERATION_BYTES`` holds on this kind of device.

    Keys and values of all blocks: 2 D (2 B) L C itemsize, guidance doubling the B images. At the last scale of L_S
    tokens the larger of: FFN and the rest of a block, 2 B L_S (2 H + 8 C) itemsize; logits of V codes with what
    guidance, filtering and sampling make of them, 40 B L_S V (three fp32 rows of both halves, values and order of a
    sort, probabilities). If a batch is cut into pieces, the random numbers of all its images too, 4 L V each.
    """
    pyramid, last = config.schedule, config.schedule.lengths[-1]
    under_way = min(batch, images_at_once(config, tokenizer, itemsize, device))
    block = 2 * under_way * last * (2 * config.hidden + 8 * config.width) * itemsize
    return {
        "keys and values": 4 * config.depth * under_way * pyramid.total * config.width * itemsize,
        "tokens of the last scale": max(block, 40 * under_way * last * logits_of(config)),
        "random numbers": 4 * batch * pyramid.total * logits_of(config) if under_way < batch else 0,
    }


def estimate_convert(
    config: Config,
    tokenizer: Any,
    recipe: Recipe,
    *,
    keep: bool = False,
    itemsize: int = 4,
    device: str = "cpu",
) -> MemoryEstimate:
    """Peak memory of ``convert``: the largest of its phases.

    P calibration pyramids in batches of B; L tokens each, L_g of them from the scale before the first gated one on; C
    width, H hidden neurons, E experts, T tokens sampled at the scales that become sparse.

    In every phase the dense weights, which are read into memory once.

    - sampling: a copy of the weights if the recipe samples in half precision, and ``sampling_memory``; from images
      instead the tokenizer's widest feature maps, six of ch S^2 for each image of S pixels a side.
    - searching (P here at most ``budget.pyramids``): 2 C^2 moments of every block, and the larger of a batch
      backwards, (D + 12) B L C for the states and one block, 8 B L H for its FFN, 4 B L V for the logits, all fp32; and
      of measuring: states and FFN inputs as below, one block at work, and the outputs of E experts for the tokens on
      which a choice is measured;
    - converting: the sparse weights, beside all dense ones if those are kept, else beside one block of them; the
      states, P L C; those before a gated block, P L_g C; sampled FFN inputs, 2 T C; and the largest of
      a batch in one block, B L (2 H + 8 C);
      clustering: hidden activations, a copy of them and one fp64 slice, T (2 H + PROFILES * 8 bytes);
      the router's start: CHUNK tokens with four arrays of H, products of experts' weights, H^2 / E + C H, three fp64
      arrays of C^2;
      the least squares of a gate: twelve fp64 arrays of C^2 and three of CHUNK tokens;
    - refitting block after block: the sparse weights and the dense ones; P (L + 1) C of states and conditions of the
      dense model, twice in a block, and of the sparse one under each plan; moments of H^2 in fp32 and twice in fp64, of
      C H likewise and once more; and a batch: in one block, B L (2 H + 14 C), or four arrays of H at the last scale, or
      three of logits, all fp32, or the least squares of a gate as above.

    Args:
        config, tokenizer: shape of the dense model.
        recipe: pyramids, batch, experts and plan.
        keep: whether the dense model is kept, see ``convert_model``.
        itemsize: bytes of a number of the model.
        device: kind of device that samples and converts, which decides how many images are under way at once.

    Raises:
        RecipeError: the recipe's budget is out of reach.
    """
    keep = keep or recipe.experts.compensation == "sequential"
    plans, default = recipe_plans(config, recipe)
    transformer = empty_backbone(config, Plans(plans, default))
    sparse = itemsize * sum(tensor.numel() for tensor in transformer.state_dict().values())
    backbone = empty_backbone(config)
    dense = itemsize * sum(tensor.numel() for tensor in backbone.state_dict().values())
    one_block = itemsize * sum(tensor.numel() for tensor in backbone.blocks[0].state_dict().values())
    wanted = [wanted_of(block) for block in transformer.blocks]
    calibration = recipe.calibration
    common = {"program": PROGRAM, "dense weights": dense}

    steps = _steps(config, recipe, wanted, itemsize)
    if searches(recipe):
        del steps["clustering"]  # the search has done it

    def phase(name: str, parts: Mapping[str, int]) -> MemoryEstimate:
        by_batch = name != "converting" or max(steps.values()) == steps["batch"]
        lower = ("calibration.batch", "calibration.pyramids") if by_batch else ("calibration.pyramids",)
        return MemoryEstimate("convert", name, {**common, **parts}, lower)

    if recipe.data.images is not None:
        maps = 6 * 4 * calibration.batch * tokenizer.ch * tokenizer.image_size**2
        sampling = {"feature maps of the tokenizer": maps}
    else:
        batch = min(calibration.batch, calibration.pyramids)
        drawing = min(itemsize, DTYPES[recipe.dtype].itemsize)
        sampling = {
            "weights in half precision": 0 if drawing == itemsize else dense * drawing // itemsize,
            **sampling_memory(config, tokenizer, batch, drawing, device),
        }
    converting = {
        "sparse weights": sparse,
        "dense weights": dense if keep else one_block,
        **_records(config, wanted, calibration.pyramids, itemsize),
        "one block at work": max(steps.values()),
    }
    phases = [phase("sampling", sampling), phase("converting", converting)]
    if recipe.experts.compensation == "sequential":
        refitting = {"sparse weights": sparse, **_refitting(config, recipe, len(plans), itemsize)}
        phases.append(phase("refitting", refitting))
    if searches(recipe):
        phases.append(phase("searching", _searching(config, recipe, itemsize)))
    return fullest(*phases)


def _searching(config: Config, recipe: Recipe, itemsize: int) -> dict[str, int]:
    pyramid, width, depth = config.schedule, config.width, config.depth
    pyramids = min(recipe.calibration.pyramids, recipe.budget.pyramids)
    rows = min(recipe.calibration.batch, pyramids) * pyramid.total
    backwards = 4 * rows * ((depth + 12) * width + 8 * config.hidden + 4 * logits_of(config))
    gated = recipe.budget.gate_keep < 1 and recipe.budget.gate_scales > 0
    every = Wanted(frozenset(range(pyramid.num_scales)), 0 if gated else None)
    records = _records(config, [every], pyramids, itemsize, SEARCH_TOKENS)
    measured = 4 * max(MEASURED_TOKENS, *pyramid.lengths) * recipe.experts.count * width
    work = max(_steps(config, recipe, [every], itemsize, SEARCH_TOKENS).values()) + measured
    return {
        "moments of gradients": 2 * 4 * depth * width * width,
        "a batch of pyramids backwards": max(0, backwards - sum(records.values()) - work),
        **records,
        "one block at work": work,
    }


def _refitting(config: Config, recipe: Recipe, plans: int, itemsize: int) -> dict[str, int]:
    pyramid, width, hidden = config.schedule, config.width, config.hidden
    pyramids, batch = recipe.calibration.pyramids, min(recipe.calibration.batch, recipe.calibration.pyramids)
    through = batch * pyramid.total * (2 * hidden + 14 * width) * itemsize
    gate = 12 * 8 * width * width + 3 * 8 * CHUNK * width
    added = 4 * batch * pyramid.lengths[-1] * (4 * hidden + 2 * width)
    logits = 4 * batch * pyramid.total * 3 * logits_of(config)
    solved = 20 * hidden * hidden + 28 * hidden * width
    return {
        "states of the calibration pyramids": (2 + plans) * pyramids * (pyramid.total + 1) * width * itemsize,
        "one block at work": max(through, added, logits, gate) + solved,
    }


def _sampled(config: Config, wanted: Wanted, pyramids: int, per_scale: int) -> int:
    """FFN inputs that are sampled of one block."""
    return sum(min(per_scale, pyramids * config.schedule.lengths[scale]) for scale in wanted.ffn)


def _records(
    config: Config, wanted: list[Wanted], pyramids: int, itemsize: int, per_scale: int = TOKENS_PER_SCALE
) -> dict[str, int]:
    pyramid = config.schedule
    around = [0 if w.states_from is None else pyramid.total - pyramid.begins[w.states_from] for w in wanted]
    sampled = max(_sampled(config, each, pyramids, per_scale) for each in wanted)
    return {
        "states of the calibration pyramids": pyramids * pyramid.total * config.width * itemsize,
        "states before a gated block": pyramids * max(around) * config.width * itemsize,
        "sampled FFN inputs": 2 * sampled * config.width * itemsize,
    }


def _steps(
    config: Config, recipe: Recipe, wanted: list[Wanted], itemsize: int, per_scale: int = TOKENS_PER_SCALE
) -> dict[str, int]:
    width, hidden, batch = config.width, config.hidden, min(recipe.calibration.batch, recipe.calibration.pyramids)
    sampled = max(_sampled(config, each, recipe.calibration.pyramids, per_scale) for each in wanted)
    router = CHUNK * 4 * hidden + hidden * hidden // recipe.experts.count + width * hidden
    return {
        "batch": batch * config.schedule.total * (2 * hidden + 8 * width) * itemsize,
        "clustering": sampled * (2 * hidden * itemsize + min(PROFILES, hidden) * 8),
        "router": router * itemsize + 3 * 8 * width * width,
        "gate": 12 * 8 * width * width + 3 * 8 * CHUNK * width,
    }


def require_memory(estimate: MemoryEstimate, device: torch.device | None = None) -> None:
    """Checks that an estimate fits what is free.

    Raises:
        InputError: it does not, with both figures, the largest parts, and what to lower.
    """
    free = free_memory_bytes(device)
    if estimate.total <= free:
        return
    where = f"of the memory of {device}" if device is not None and device.type == "cuda" else "of memory"
    lower = f"Lower {' or '.join(estimate.lower)} in the recipe (--set), or use" if estimate.lower else "Use"
    parts = sorted(estimate.parts.items(), key=lambda part: -part[1])
    raise InputError(
        f"{estimate.work} needs about {memory_text(estimate.total)} {where} ({estimate.phase}), and "
        f"{memory_text(free)} are free. {lower} a larger machine. The largest parts:",
        [f"{name}: {memory_text(size)}" for name, size in parts[:4] if size],
    )
