"""How a dense backbone becomes one that runs plans: its FFNs are swapped, and blocks that skip tokens are wrapped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from actvar_convert.errors import RecipeError
from actvar_convert.models.base import inner
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.gate import GatedBlock
from actvar_convert.plan import Plans


def split(backbone: Any, plans: Plans) -> None:
    """Gives a dense backbone experts, routers, gates and reconstructions, all without values yet, in place.

    Raises:
        RecipeError: a plan does not fit the backbone, or the plans do not fit each other.
    """
    if plans.name not in plans.named:
        raise RecipeError(f"plan {plans.name!r} is not among the plans: {', '.join(plans.named)}")
    problems = plans.problems(backbone.config)
    if problems:
        raise RecipeError("the sparsity plans do not fit the model:", problems)
    for index, block in enumerate(backbone.blocks):
        fc1 = block.ffn.fc1
        block.ffn = ExpertFFN(fc1.in_features, fc1.out_features, fc1.bias is not None, index, plans)
        gating = plans.gated(index)
        if gating:
            rank = gating[0].reconstruction_rank
            backbone.blocks[index] = GatedBlock(block, index, plans, backbone.config.schedule, fc1.in_features, rank)


def take_dense(backbone: nn.Module, dense: Mapping[str, Tensor]) -> list[str]:
    """Loads a dense backbone's tensors into one that was split, neurons in their order; returns what it has beside."""
    own = {name: dense[stored_name(name)] for name in backbone.state_dict() if stored_name(name) in dense}
    return list(backbone.load_state_dict(own, strict=False).missing_keys)


def expert_ffns(backbone: nn.Module) -> Iterator[ExpertFFN]:
    """The FFNs of a backbone that was split, first block to last."""
    return (module for module in backbone.modules() if isinstance(module, ExpertFFN))


def gated_blocks(backbone: nn.Module) -> Iterator[GatedBlock]:
    """The blocks with a gate, in order."""
    return (module for module in backbone.modules() if isinstance(module, GatedBlock))


ADDED = ("router", "gate", "reconstruction", "low-rank update")
"""Roles of what the method adds; other roles mark parts that a dense backbone has."""


def roles(backbone: nn.Module) -> dict[str, str]:
    """The role of every tensor of a module that has one (router, gate, reconstruction, modulation ...), by name."""
    found: dict[str, str] = {}
    for prefix, module in backbone.named_modules():
        role = getattr(module, "role", None)
        if role is not None:
            for tensors in (module.named_parameters(), module.named_buffers()):
                found |= {f"{prefix}.{name}": role for name, _ in tensors}
    return found


def added(backbone: nn.Module) -> dict[str, str]:
    """The same of what the method has added alone."""
    return {name: role for name, role in roles(backbone).items() if role in ADDED}


def stored_name(name: str) -> str:
    """The name of a tensor on disk: that of the dense model for what the dense model has, gate or not."""
    return re.sub(r"^(blocks\.\d+)\.block\.", r"\1.", name)


def stored_state(backbone: nn.Module) -> dict[str, Tensor]:
    """All tensors by their names on disk."""
    return {stored_name(name): tensor for name, tensor in backbone.state_dict().items()}


def plans_of(model: Any) -> Plans:
    """The plans of a sparse model."""
    assert model.plans is not None
    plans: Plans = model.plans
    return plans


def ffn_of(block: nn.Module) -> Any:
    """The FFN of a block, with or without a gate around the block."""
    return inner(block).ffn
