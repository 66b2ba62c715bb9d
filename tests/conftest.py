"""Models small enough for any test, shared by all of them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actvar_convert.conversion.activations import Calibration
from actvar_convert.conversion.converter import convert_model
from actvar_convert.conversion.experts import Partition
from actvar_convert.conversion.search import Planned
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.split import stored_name, take_dense
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.schema import Recipe

SIDES = (1, 2, 3, 4)


def gated_plan(
    plan: SparsityPlan, keep: float = 0.6, *, blocks: Iterable[int] = (1,), scales: Iterable[int] = (-1,)
) -> SparsityPlan:
    """A plan whose named blocks keep a share of the tokens at the named scales, and all tokens elsewhere."""
    changed = list(plan.blocks)
    for block in blocks:
        row = [1.0] * len(plan.blocks[block].keep)
        for scale in scales:
            row[scale] = keep
        changed[block] = plan.blocks[block].model_copy(update={"keep": tuple(row)})
    return plan.model_copy(update={"blocks": tuple(changed)})


def calibration_of(model: Model, tokens: torch.Tensor, labels: torch.Tensor, batch: int = 8) -> Calibration:
    """Pyramids that a model is measured on, with their labels."""
    return Calibration(tokens.long(), model.family.condition(model.config, labels), batch)


def convert_with(
    dense: Model,
    plans: Mapping[str, SparsityPlan],
    default: str,
    recipe: Recipe,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    partitions: list[Partition] | None = None,
) -> Model:
    """A conversion to stated plans, on given pyramids."""
    planned = Planned(dict(plans), default, partitions, {})
    return convert_model(dense, planned, recipe, calibration_of(dense, tokens, labels, recipe.calibration.batch))


@pytest.fixture
def tiny_model() -> Model:
    """A dense model with random weights: 2 blocks of width 64, 128 hidden neurons, 5 classes."""
    config = TransformerConfig(depth=2, width=64, heads=2, hidden=128, sides=SIDES, vocab=32, z_channels=8, classes=5)
    tokenizer = TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=32, z_channels=8, sides=SIDES)
    torch.manual_seed(0)
    transformer = VARTransformer(config)
    transformer.initialise(torch.Generator().manual_seed(0))
    for parameter in transformer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Model(transformer, VQVAE(tokenizer)).eval().requires_grad_(False)


@pytest.fixture
def tiny_sparse(tiny_model: Model) -> Model:
    """The tiny model with 8 experts per FFN, routed at the last two scales, and a token gate at the last one.

    Dense weights as they are; routers and gates random. Plans: ``default`` and ``all`` (everything runs).
    """
    config = tiny_model.config
    block = BlockPlan(prefix=(8, 8, 2, 2), routed=(0, 0, 2, 2), keep=(1.0, 1.0, 1.0, 0.5))
    plans = {
        "default": SparsityPlan(experts=8, blocks=(block,) * config.depth),
        "all": SparsityPlan.dense(config, experts=8),
    }
    model = fresh_sparse(config, tiny_model.tokenizer, plans, "default", tiny_model.sampling)
    added = take_dense(model.transformer, tiny_model.transformer.state_dict())
    generator = torch.Generator().manual_seed(1)
    for name, tensor in sorted(model.transformer.state_dict().items(), key=lambda item: stored_name(item[0])):
        if name in added and tensor.is_floating_point():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny_folded(tiny_sparse: Model) -> Model:
    """The tiny sparse model with guidance folded into its predictions, which nothing has trained."""
    plan = tiny_sparse.plan.model_copy(update={"guidance": "folded"})
    model = fresh_sparse(tiny_sparse.config, tiny_sparse.tokenizer, {"default": plan}, "default", tiny_sparse.sampling)
    model.transformer.load_state_dict(tiny_sparse.transformer.state_dict())
    return model.eval().requires_grad_(False)


class MemoryWatch(TorchDispatchMode):
    """While active, adds up the bytes of CPU tensors that are made and still alive; ``peak`` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out


@pytest.fixture
def memory_watch() -> MemoryWatch:
    """Measures the memory of what runs within it: ``with memory_watch: ...``."""
    return MemoryWatch()
