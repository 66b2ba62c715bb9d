"""The conversion: a dense VARModel in, a SparseVARModel out that generates at once, no training needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from actvar_convert.convert.activations import BlockRecord, record_blocks
from actvar_convert.convert.experts import calibrate_inactive, install_experts, partition_neurons, start_router
from actvar_convert.convert.gates import start_gate
from actvar_convert.models.model import VARModel
from actvar_convert.models.plan import SparsityPlan
from actvar_convert.models.sparse import SparseBlock, SparseVARModel, SparseVARTransformer
from actvar_convert.models.var import FFN, Block
from actvar_convert.recipe.schema import Recipe

TOKENS_PER_SCALE = 2048
"""FFN inputs kept per scale and block for clustering, router start and constants."""


@torch.no_grad()
def convert_model(
    dense: VARModel,
    plans: Mapping[str, SparsityPlan],
    default: str,
    recipe: Recipe,
    tokens_PL: Tensor,
    labels_P: Tensor,
    *,
    on_block: Callable[[], None] = lambda: None,
) -> SparseVARModel:
    """Splits FFNs into experts, starts routers, constants, gates and reconstructions, block by block.

    Args:
        dense: the model to convert; left as it is, no tensor of the result shares memory with it but the tokenizer's.
        plans, default: what the result can execute, and which plan is in force.
        recipe: the settings of the method.
        tokens_PL, labels_P: calibration pyramids and their classes.
        on_block: called after every block.
    """
    config = dense.transformer.config
    with torch.device("meta"):
        transformer = SparseVARTransformer(config, plans, default)
    transformer = transformer.to_empty(device=dense.device).to(dense.dtype)
    _copy_shared(dense.transformer, transformer)
    records = record_blocks(
        dense,
        tokens_PL,
        labels_P,
        batch=recipe.calibration.batch,
        tokens_per_scale=TOKENS_PER_SCALE,
        seed=recipe.seed,
    )
    for block, record in records:
        _convert_block(block, transformer.blocks[record.index], record, recipe)
        on_block()
    transformer.requires_grad_(False).train(dense.training)
    return SparseVARModel(transformer, dense.tokenizer, dense.sampling)


def _copy_shared(dense: nn.Module, sparse: nn.Module) -> None:
    """Copies everything that both have by name, FFNs aside; fresh gates and routers start at zero."""
    given = dense.state_dict()
    for name, tensor in sparse.state_dict().items():
        if ".ffn." not in name and name in given:
            tensor.copy_(given[name])
        elif tensor.is_floating_point():
            tensor.zero_()


def _convert_block(block: Block, sparse: nn.Module, record: BlockRecord, recipe: Recipe) -> None:
    assert isinstance(sparse, SparseBlock) and isinstance(block.ffn, FFN)
    ffn, pyramid = sparse.ffn, sparse.config.pyramid
    plans = list(ffn.plans.values())
    partial = [
        s for s in range(pyramid.num_scales) if not all(plan.runs_all(sparse.index, s) for plan in plans)
    ] or list(range(pyramid.num_scales))
    routed = [s for s in partial if any(plan.routes(sparse.index, s) for plan in plans)] or partial
    shared = min(plan.blocks[sparse.index].prefix[s] for plan in plans for s in partial)
    partition = partition_neurons(
        block.ffn, torch.cat([record.ffn_input[s] for s in partial]), recipe.experts, shared, recipe.seed
    )
    install_experts(ffn, block.ffn, partition)
    start_router(ffn, torch.cat([record.ffn_input[s] for s in routed]))
    calibrate_inactive(ffn, record.ffn_input, recipe.experts.inactive)
    start_gate(sparse, record, pyramid)
