"""Starting values of token gates and of the reconstruction of skipped tokens, by least squares on calibration tokens.

Everything is added up batch by batch, so that a block's updates never exist for all pyramids at once.
Shapes: B pyramids of a batch, L tokens of a scale, C width, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from actvar_convert.conversion.activations import BlockRecord, States
from actvar_convert.conversion.least_squares import Moments
from actvar_convert.models.base import Schedule
from actvar_convert.models.gate import GatedBlock, Reconstruction, TokenGate, upsample_update


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """||after - before|| / ||before|| of every token; [..., C] to [...]."""
    size: Tensor = torch.linalg.vector_norm(before, dim=-1)
    change: Tensor = torch.linalg.vector_norm(after - before, dim=-1)
    return change / size.clamp_min(1e-6)


def gated_scales(block: nn.Module) -> list[int]:
    """Scales at which some plan skips tokens in a block; none if it has no gate."""
    if not isinstance(block, GatedBlock):
        return []
    plans, lengths = [plan.blocks[block.index] for plan in block.plans], enumerate(block.schedule.lengths)
    return [scale for scale, length in lengths if any(plan.kept(scale, length) < length for plan in plans)]


def first_needed_scale(block: nn.Module) -> int | None:
    """The coarsest scale whose states ``start_gate`` looks at: the one before the first gated; None: no gate."""
    scales = gated_scales(block)
    return max(0, scales[0] - 1) if scales else None


def start_gate(block: nn.Module, record: BlockRecord) -> None:
    """Fits the gate to the dense block's relative update norms and the reconstruction to its updates."""
    if isinstance(block, GatedBlock) and gated_scales(block):
        fit_gate(block.gate, block.reconstruction, record, block.schedule, gated_scales(block))


@torch.no_grad()
def fit_gate(
    gate: TokenGate, reconstruction: Reconstruction, record: BlockRecord, schedule: Schedule, scales: Sequence[int]
) -> None:
    """The same for a gate and a reconstruction of their own, used at some scales."""
    width = gate.linear.in_features
    if reconstruction.rank:
        reconstruction.up.weight.data.zero_()
    moments = Moments(width, 1 + width, record.states[0].after.device)
    for scale in scales:
        _start_alpha(reconstruction, record, schedule, scale)
        for states in record.states:
            before, after = states.at(schedule.slice(scale))
            missing = after - reconstruction(before, previous_update(states, schedule, scale), scale)
            size = relative_update(before, after).unsqueeze(-1)
            moments.add(before.flatten(0, 1), torch.cat((size, missing), -1).flatten(0, 1))
    weight, bias = moments.columns(slice(0, 1)).ridge()
    gate.linear.weight.data.copy_(weight)
    gate.linear.bias.data.copy_(bias)
    if reconstruction.rank:
        down, up = moments.columns(slice(1, None)).reduced_rank(reconstruction.rank)
        reconstruction.down.weight.data.copy_(down)
        reconstruction.up.weight.data.copy_(up)


def _start_alpha(reconstruction: Reconstruction, record: BlockRecord, schedule: Schedule, scale: int) -> None:
    """Fits, channel by channel, the share of the previous scale's update that a token's own update has."""
    if scale == 0:
        return
    sums: list[Tensor] = []
    for states in record.states:
        up = previous_update(states, schedule, scale)
        assert up is not None
        own = states.update(schedule.slice(scale))
        sums.append(torch.stack([(part * up).sum((0, 1), dtype=torch.float64) for part in (own, up)]))
    product, square = torch.stack(sums).sum(0)
    reconstruction.alpha.data[scale] = product / square.clamp_min(1e-9)


def previous_update(states: States, schedule: Schedule, scale: int) -> Tensor | None:
    """The update at the scale before, resized to this one's map, [B, L_s, C]; None at the first scale."""
    if scale == 0:
        return None
    return upsample_update(states.update(schedule.slice(scale - 1)), schedule.maps[scale - 1], schedule.maps[scale])
