"""The conversion: a dense model in, a sparse one out that generates at once, no training needed.

Block by block: the result gets memory for a block when that block is converted. If the dense model is not needed any
more it gives up the memory of the block then, so the peak is about one copy of the weights and the calibration states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actvar_convert.conversion.activations import BlockRecord, Calibration, Wanted, record_blocks
from actvar_convert.conversion.experts import Partition, install_experts, partition_neurons, start_router
from actvar_convert.conversion.gates import first_needed_scale, start_gate
from actvar_convert.conversion.refitting import refit_in_order
from actvar_convert.conversion.search import Planned
from actvar_convert.files.skeleton import empty_backbone
from actvar_convert.models.base import Config, inner
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.gate import GatedBlock
from actvar_convert.models.model import Model
from actvar_convert.models.split import ffn_of
from actvar_convert.plan import Plans
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.device import trim_memory
from actvar_convert.system.processes import Processes

TOKENS_PER_SCALE = 2048
"""FFN inputs kept per scale and block for clustering and router start."""


@torch.no_grad()
def convert_model(
    dense: Model,
    planned: Planned,
    recipe: Recipe,
    calibration: Calibration,
    *,
    keep: bool = True,
    on_block: Callable[[], None] = lambda: None,
) -> Model:
    """Splits FFNs into experts, starts routers, gates and reconstructions, block by block.

    Args:
        dense: the model to convert; left as it is, no tensor of the result shares memory with it but the tokenizer's.
        keep: False: its tensors go to the result where they can, and it is of no use afterwards; unless blocks are
            refitted, which needs both models.
        planned: what the result can execute, and the partitions that a search made.
        recipe: the settings of the method.
        calibration: pyramids.
        on_block: called after every block, ``conversion_steps`` times.
    """
    plans = Plans(planned.plans, planned.default)
    backbone = empty_backbone(dense.config, plans)
    keep = keep or recipe.experts.compensation == "sequential"
    _fill(backbone, dense.transformer.state_dict(), dense.transformer.head.weight, but=("blocks.",), copy=keep)
    records = record_blocks(
        dense,
        calibration,
        wanted=lambda index: wanted_of(backbone.blocks[index]),
        tokens_per_scale=TOKENS_PER_SCALE,
        seed=recipe.seed,
    )
    for block, record in records:
        partition = planned.partitions[record.index] if planned.partitions is not None else None
        _convert_block(block, backbone.blocks[record.index], record, recipe, partition, copy=keep)
        del record
        if not keep:
            block.to("meta")
        trim_memory()
        on_block()
    backbone.requires_grad_(False)
    sparse = Model(backbone, dense.tokenizer, dense.sampling, plans).train(dense.training)
    if recipe.experts.compensation == "sequential":
        refit_in_order(dense, sparse, calibration, on_block=on_block)
    return sparse


def conversion_steps(config: Config, recipe: Recipe) -> int:
    """How often ``convert_model`` calls ``on_block``."""
    depth: int = config.depth
    return depth * (2 if recipe.experts.compensation == "sequential" else 1)


def _fill(
    module: nn.Module, given: Mapping[str, Tensor], like: Tensor, but: tuple[str, ...] = (), copy: bool = True
) -> None:
    """Gives the tensors of a module the values of those that have their name, else zeros.

    Args:
        module: its weights have no memory yet.
        given: values by name.
        like: a tensor of the device and floating-point dtype that the others get.
        but: beginnings of names that are left as they are.
        copy: the values, else they are shared.
    """
    state = {}
    for name, empty in module.state_dict().items():
        if name in given and not name.startswith(but):
            state[name] = given[name].clone() if copy else given[name]
        elif not name.startswith(but):
            dtype = like.dtype if empty.is_floating_point() else empty.dtype
            state[name] = torch.zeros(empty.shape, dtype=dtype, device=like.device)
    module.load_state_dict(state, strict=False, assign=True)


def _partial_scales(ffn: ExpertFFN) -> list[int]:
    """Scales at which some plan leaves experts inactive; all, if none does."""
    plans = list(ffn.plans)
    scales = range(len(plans[0].blocks[ffn.index].keep))
    return [s for s in scales if not all(plan.runs_all(ffn.index, s) for plan in plans)] or list(scales)


def wanted_of(block: nn.Module) -> Wanted:
    """What the conversion of a block needs to see of the dense one."""
    return Wanted(frozenset(_partial_scales(ffn_of(block))), first_needed_scale(block))


def _convert_block(
    block: Any, sparse: nn.Module, record: BlockRecord, recipe: Recipe, partition: Partition | None, *, copy: bool
) -> None:
    ffn: ExpertFFN = ffn_of(sparse)
    plans, partial, like = list(ffn.plans), _partial_scales(ffn), block.ffn.fc1.weight
    routed = [s for s in partial if any(plan.routes(ffn.index, s) for plan in plans)] or partial
    if partition is None:
        shared = min(plan.blocks[ffn.index].prefix[s] for plan in plans for s in partial)
        inputs = torch.cat([record.ffn_input[s] for s in partial])
        partition = partition_neurons(block.ffn, inputs, recipe.experts, shared, recipe.seed)
    _fill(inner(sparse), block.state_dict(), like, but=("ffn.fc1.", "ffn.fc2.", "ffn.permutation"), copy=copy)
    if isinstance(sparse, GatedBlock):
        _fill(sparse.gate, {}, like)
        _fill(sparse.reconstruction, {}, like)
    install_experts(ffn, block.ffn, partition)
    start_router(ffn, torch.cat([record.ffn_input[s] for s in routed]))
    start_gate(sparse, record)


def made_by_main(make: Callable[[], Model], dense: Model, processes: Processes) -> Model:
    """The model that the main process makes from a dense one, in all processes: the others get copies of its tensors.

    Args:
        make: makes it.
        dense: what it is made from; gives tokenizer and device.
        processes: those that want it.
    """
    model = make() if processes.main else None
    named, name = processes.from_main(
        ({}, "") if model is None or model.plans is None else (model.plans.named, model.plans.name)
    )
    if model is None:
        plans = Plans(named, name)
        backbone = empty_backbone(dense.config, plans)
        model = Model(backbone, dense.tokenizer, dense.sampling, plans)
    dtypes = processes.from_main({name: tensor.dtype for name, tensor in model.transformer.state_dict().items()})
    if not processes.main:
        empty = {
            name: torch.empty(tensor.shape, dtype=dtypes[name], device=dense.device)
            for name, tensor in model.transformer.state_dict().items()
        }
        model.transformer.load_state_dict(empty, assign=True)
        model.transformer.requires_grad_(False).train(dense.training)
    processes.copy_from_main(model.transformer.state_dict().values())
    return model
