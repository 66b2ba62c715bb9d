"""Models small enough for any test, shared by all of them."""

from __future__ import annotations

import pytest
import torch

from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.model import VARModel
from actvar_convert.models.plan import BlockPlan, SparsityPlan
from actvar_convert.models.sparse import SparseVARModel, SparseVARTransformer
from actvar_convert.models.var import VARTransformer
from actvar_convert.models.vqvae import VQVAE

SIDES = (1, 2, 3, 4)


@pytest.fixture
def tiny_model() -> VARModel:
    """A dense model with random weights: 2 blocks of width 64, 128 hidden neurons, 5 classes."""
    config = TransformerConfig(depth=2, width=64, heads=2, hidden=128, sides=SIDES, vocab=32, z_channels=8, classes=5)
    tokenizer = TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=32, z_channels=8, sides=SIDES)
    torch.manual_seed(0)
    transformer = VARTransformer(config)
    transformer.initialise(torch.Generator().manual_seed(0))
    for parameter in transformer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return VARModel(transformer, VQVAE(tokenizer)).eval().requires_grad_(False)


@pytest.fixture
def tiny_sparse(tiny_model: VARModel) -> SparseVARModel:
    """The tiny model with 8 experts per FFN, routed at the last two scales, and a token gate at the last one.

    Dense weights as they are; routers, gates and constants random. Plans: ``default`` and ``all`` (everything runs).
    """
    config = tiny_model.transformer.config
    block = BlockPlan(prefix=(8, 8, 2, 2), routed=(0, 0, 2, 2), keep=(1.0, 1.0, 1.0, 0.5))
    plans = {
        "default": SparsityPlan(experts=8, blocks=(block,) * config.depth),
        "all": SparsityPlan.dense(config, experts=8),
    }
    transformer = SparseVARTransformer(config, plans, "default")
    added = transformer.load_state_dict(tiny_model.transformer.state_dict(), strict=False).missing_keys
    generator = torch.Generator().manual_seed(1)
    for name, tensor in transformer.state_dict().items():
        if name in added and tensor.is_floating_point():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    transformer.eval().requires_grad_(False)
    return SparseVARModel(transformer, tiny_model.tokenizer, tiny_model.sampling)
