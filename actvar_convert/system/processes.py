"""The processes that share a run, one per GPU: who they are, and the little that they tell each other.

They are started by ``torchrun`` or ``accelerate launch`` and joined through Accelerate. All of them do the same step on
the same batch, each on rows of its own. A loss is a share: it divides by what the whole batch adds up to, so the shares
of all processes, and the gradients of the shares, add up to those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from actvar_convert.errors import InputError
from actvar_convert.system.launch import launched

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

CPU = torch.device("cpu")

LONGEST_WAIT = timedelta(days=2)
"""How long a process waits for another; the first converts and measures while the others have nothing to do."""


def is_split(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor: a DTensor, a class that is not imported to ask."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing memory with it."""
    return cast("DTensor", tensor).to_local() if is_split(tensor) else tensor


@dataclass(frozen=True)
class Processes:
    """This process among all that share the run; by default it is the only one.

    Every method that talks to the others has to be called by all of them, in the same order.

    Attributes:
        rank: number of this process; 0 is the main one, which alone writes.
        count: of all processes.
        device: what this process computes on, and where small messages are exchanged.
        shard: whether the student is split over the processes while it trains, instead of copied to each.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    shard: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    def part(self, rows: int) -> slice:
        """The rows of a batch that are this process's own: contiguous, in the order of the ranks."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, without a gradient; of the same shape everywhere."""
        value = value.detach()
        if self.count == 1:
            return value
        summed: Tensor = reduce(value, "sum")
        return summed

    def any(self, *flags: bool) -> list[bool]:
        """Per flag, whether it is set in some process."""
        if self.count == 1:
            return list(flags)
        given = torch.tensor(flags, dtype=torch.float32, device=self.device)
        return [bool(flag) for flag in self.total(given).tolist()]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of the ranks; anything that can be pickled."""
        if self.count == 1:
            return [value]
        values: list[T] = gather_object([value])
        return values

    def from_main(self, value: T) -> T:
        """The main process's value; anything that can be pickled."""
        if self.count == 1:
            return value
        shared: list[T] = broadcast_object_list([value])
        return shared[0]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with the main process's."""
        if self.count > 1:
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.contiguous()))

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.count > 1:
            PartialState().wait_for_everyone()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their sums over all processes; those of split parameters are sums already."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and not is_split(parameter.grad):
                parameter.grad = self.total(parameter.grad)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scales summed gradients so that their common norm is at most ``limit``; returns the norm before.

        If the norm is not finite, gradients stay as they are, so that one can see whose they are.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        split = [local(gradient) for gradient in gradients if is_split(gradient)]
        copied = [gradient for gradient in gradients if not is_split(gradient)]
        norm = nn.utils.get_total_norm(copied)
        if split:
            squares = self.total(nn.utils.get_total_norm(split).to(self.device).square())
            norm = (squares + norm.to(self.device).square()).sqrt()
        scale = torch.where(norm.isfinite(), (limit / (norm + 1e-6)).clamp_max(1), 1.0)
        for gradient in (*copied, *split):
            gradient.mul_(scale.to(gradient.device))
        return norm


ALONE = Processes()
"""One process that shares nothing."""


def join(device: torch.device, *, shard: bool = False) -> Processes:
    """Joins the processes that a launcher started with this one; without a launcher there is only this one.

    Args:
        device: what this process computes on; decides how messages travel.
        shard: see ``Processes``; ``accelerate launch --use_fsdp`` asks for it too.

    Raises:
        InputError: ``shard`` without a launcher, or an environment that no launcher leaves.
    """
    launch = launched()
    if shard and not os.environ.get("WORLD_SIZE"):
        raise InputError(
            "--shard splits the model in training over several processes, and this one is alone. Start it under "
            "torchrun (torchrun --nproc-per-node N -m actvar_convert_cli ...), or leave --shard out."
        )
    if launch.count == 1:
        return Processes(device=device)
    if launch.local is None:
        os.environ["LOCAL_RANK"] = "0"  # a launcher of one process a machine need not say it, and Accelerate asks
    state = PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)
    shard = shard or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    return Processes(state.process_index, state.num_processes, device, shard and state.num_processes > 1)
