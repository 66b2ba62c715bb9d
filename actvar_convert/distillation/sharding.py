"""A student split over the processes while it trains: weights, gradients and optimiser state (FSDP2).

The units that are gathered, used and dropped again are each block's FFN, its modulation and the rest of the block. The
small parameters that losses use by themselves (routers, gates, offsets of a shared modulation) stay whole everywhere,
and so does the teacher. What only several processes need is imported when it is used: it takes as long as torch
itself to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from actvar_convert.distillation.lora import attach_lora, fold_lora
from actvar_convert.files.skeleton import empty_backbone
from actvar_convert.models.base import inner
from actvar_convert.models.model import Model
from actvar_convert.models.split import plans_of, roles
from actvar_convert.system.processes import Processes, is_split

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Objective = Callable[..., dict[str, Tensor]]

WHOLE = ("router", "gate")
"""Roles of the parameters that are not split; a block's own parameters, outside of its layers, are not either."""


class Step(nn.Module):
    """The objective as forward pass of a module around the student: in it the weights outside the blocks are whole."""

    def __init__(self, transformer: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.transformer, self.objective = transformer, objective

    def forward(self, *args: Any) -> dict[str, Tensor]:
        return self.objective(*args)


def shard_student(transformer: nn.Module, objective: Objective, processes: Processes) -> Step:
    """Splits a student, in place; returns what to call instead of the objective.

    ``requires_grad`` has to be set before: it decides which gradients are exchanged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    role = roles(transformer)
    kept = {p for name, p in transformer.named_parameters() if role.get(name) in WHOLE}
    for block in cast(nn.ModuleList, transformer.blocks):
        own = inner(block)
        kept |= set(own.parameters(recurse=False))
        modulations = [each for each in own.modules() if getattr(each, "role", None) == "modulation"]
        for unit in (*modulations, own.ffn, block):
            fully_shard(unit, mesh=mesh, ignored_params=kept)
        own.ffn.register_forward_pre_hook(_with_gradient, prepend=True)
    step = Step(transformer, objective)
    fully_shard(step, mesh=mesh, ignored_params=kept)
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return step


def _with_gradient(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Gives an FFN's input a gradient: the unit is dropped as soon as that is known, not at the end of the pass."""
    x = args[0]
    if x.requires_grad or not torch.is_grad_enabled():
        return None
    return (x.detach().requires_grad_(), *args[1:])


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Parameters of a split unit are whole while the block runs, for uses outside of its forward pass."""
    unit: Any = module
    if not hasattr(unit, "unshard"):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the processes if it is split; every process has to ask for it."""
    return cast("DTensor", tensor).full_tensor() if is_split(tensor) else tensor


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of a parameter, split as that is; every process has the same whole tensor."""
    tensor = tensor.to(parameter.device)
    if not is_split(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like = cast("DTensor", parameter)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole_student(model: Model, lora_rank: int | None) -> None:
    """Makes a student of ordinary modules from one that was split, in place.

    Args:
        model: with the split backbone.
        lora_rank: rank of its low-rank updates, which are folded; None: it has none.
    """
    split, plans = model.transformer, plans_of(model)
    state = {name: whole(tensor).detach() for name, tensor in split.state_dict().items()}
    fresh = empty_backbone(model.config, plans)
    if lora_rank is not None:
        attach_lora(fresh, lora_rank, seed=0)
    fresh.load_state_dict(state, assign=True)
    fold_lora(fresh)
    model.transformer = fresh.requires_grad_(False).train(split.training)
