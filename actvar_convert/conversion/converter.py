"""The conversion: a dense VARModel in, a SparseVARModel out that generates at once, no training needed.

Block by block: the result gets memory for a block when that block is converted, and the pages of a mapped source file
are handed back when it is done, so the peak is about one copy of the weights and the calibration states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from actvar_convert.conversion.activations import BlockRecord, Wanted, record_blocks
from actvar_convert.conversion.experts import (
    Partition,
    install_experts,
    partition_neurons,
    start_router,
)
from actvar_convert.conversion.gates import first_needed_scale, start_gate
from actvar_convert.conversion.refitting import refit_in_order
from actvar_convert.files.skeleton import NoWeights
from actvar_convert.models.config import TransformerConfig
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseBlock, SparseVARModel, SparseVARTransformer
from actvar_convert.models.var import FFN, Block
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.device import release_pages
from actvar_convert.system.processes import Processes

TOKENS_PER_SCALE = 2048
"""FFN inputs kept per scale and block for clustering and router start."""


@torch.no_grad()
def convert_model(
    dense: VARModel,
    plans: Mapping[str, SparsityPlan],
    default: str,
    recipe: Recipe,
    tokens_PL: Tensor,
    labels_P: Tensor,
    *,
    partitions: Sequence[Partition] | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> SparseVARModel:
    """Splits FFNs into experts, starts routers, gates and reconstructions, block by block.

    Args:
        dense: the model to convert; left as it is, no tensor of the result shares memory with it but the tokenizer's.
        plans, default: what the result can execute, and which plan is active.
        recipe: the settings of the method.
        tokens_PL, labels_P: calibration pyramids and their classes.
        partitions: of every block's neurons, where a search has made them; else they are made here.
        on_block: called after every block, ``conversion_steps`` times.
    """
    with NoWeights():
        transformer = SparseVARTransformer(dense.transformer.config, plans, default)
    _fill(transformer, dense.transformer.state_dict(), dense.transformer.pos_start, but=("blocks.",))
    records = record_blocks(
        dense,
        tokens_PL,
        labels_P,
        wanted=lambda index: wanted_of(transformer.sparse_layers[index]),
        batch=recipe.calibration.batch,
        tokens_per_scale=TOKENS_PER_SCALE,
        seed=recipe.seed,
    )
    for block, record in records:
        partition = partitions[record.index] if partitions is not None else None
        _convert_block(block, transformer.sparse_layers[record.index], record, recipe, partition)
        del record
        release_pages(block.state_dict().values())
        on_block()
    transformer.requires_grad_(False)
    sparse = SparseVARModel(transformer, dense.tokenizer, dense.sampling).train(dense.training)
    if recipe.experts.compensation == "sequential":
        refit_in_order(dense, sparse, tokens_PL, labels_P, batch=recipe.calibration.batch, on_block=on_block)
    return sparse


def conversion_steps(config: TransformerConfig, recipe: Recipe) -> int:
    """How often ``convert_model`` calls ``on_block``."""
    return config.depth * (2 if recipe.experts.compensation == "sequential" else 1)


def _fill(module: nn.Module, given: Mapping[str, Tensor], like: Tensor, but: tuple[str, ...]) -> None:
    """Gives the tensors of a module the values of those that have their name, else zeros.

    Args:
        module: its weights have no memory yet.
        given: values by name; copied.
        like: a tensor of the device and floating-point dtype that the others get.
        but: beginnings of names that are left as they are.
    """
    state = {}
    for name, empty in module.state_dict().items():
        if name in given and not name.startswith(but):
            state[name] = given[name].clone()
        elif not name.startswith(but):
            dtype = like.dtype if empty.is_floating_point() else empty.dtype
            state[name] = torch.zeros(empty.shape, dtype=dtype, device=like.device)
    module.load_state_dict(state, strict=False, assign=True)


def _partial_scales(block: SparseBlock) -> list[int]:
    """Scales at which some plan lets experts rest; all, where none does."""
    scales, plans = range(len(block.config.sides)), block.ffn.plans.values()
    return [s for s in scales if not all(plan.runs_all(block.index, s) for plan in plans)] or list(scales)


def wanted_of(block: SparseBlock) -> Wanted:
    """What the conversion of a block needs to see of the dense one."""
    return Wanted(frozenset(_partial_scales(block)), first_needed_scale(block))


def _convert_block(
    block: Block, sparse: SparseBlock, record: BlockRecord, recipe: Recipe, partition: Partition | None
) -> None:
    assert isinstance(block.ffn, FFN)
    ffn, plans = sparse.ffn, list(sparse.ffn.plans.values())
    partial = _partial_scales(sparse)
    routed = [s for s in partial if any(plan.routes(sparse.index, s) for plan in plans)] or partial
    if partition is None:
        shared = min(plan.blocks[sparse.index].prefix[s] for plan in plans for s in partial)
        inputs = torch.cat([record.ffn_input[s] for s in partial])
        partition = partition_neurons(block.ffn, inputs, recipe.experts, shared, recipe.seed)
    _fill(sparse, block.state_dict(), block.ffn.fc1.weight, but=("ffn.fc1.", "ffn.fc2.", "ffn.permutation"))
    install_experts(ffn, block.ffn, partition)
    start_router(ffn, torch.cat([record.ffn_input[s] for s in routed]))
    start_gate(sparse, record, sparse.config.pyramid)


def made_by_main(
    make: Callable[[], SparseVARModel],
    dense: VARModel,
    processes: Processes,
) -> SparseVARModel:
    """The model that the main process makes from a dense one, in all processes: the others get copies of its tensors.

    Args:
        make: makes it.
        dense: what it is made from; gives tokenizer and device.
        processes: those that want it.
    """
    model = make() if processes.main else None
    plans, default = processes.from_main(({}, "") if model is None else (model.plans, model.plan_name))
    if model is None:
        with torch.device("meta"):
            transformer = SparseVARTransformer(dense.transformer.config, plans, default)
        model = SparseVARModel(transformer, dense.tokenizer, dense.sampling)
    formats = processes.from_main({name: tensor.dtype for name, tensor in model.transformer.state_dict().items()})
    if not processes.main:
        empty = {
            name: torch.empty(tensor.shape, dtype=formats[name], device=dense.device)
            for name, tensor in model.transformer.state_dict().items()
        }
        model.transformer.load_state_dict(empty, assign=True)
        model.transformer.requires_grad_(False).train(dense.training)
    processes.copy_from_main(model.transformer.state_dict().values())
    return model
