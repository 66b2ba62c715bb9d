"""What every sparse setting would cost one block, before any is made: the tables that a search picks from.

Shapes: B pyramids of a batch, L tokens of a scale, T tokens, C width, H neurons, E experts, n always-on ones, K routed
ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.conversion.activations import BlockRecord, States
from actvar_convert.conversion.budget import Choice
from actvar_convert.conversion.clustering import Clustering
from actvar_convert.conversion.experts import Partition, partition_neurons, squared_sizes
from actvar_convert.conversion.fisher import OutputMetric
from actvar_convert.conversion.gates import fit_gate, previous_update
from actvar_convert.conversion.least_squares import CHUNK, Moments
from actvar_convert.kernels.token_gate import take
from actvar_convert.models.base import Call, Schedule
from actvar_convert.models.gate import Reconstruction, TokenGate
from actvar_convert.plan import kept_tokens
from actvar_convert.recipe.schema import Recipe

TOKENS = 512
"""Tokens per scale on which the damage of a choice is measured."""
LEVELS = 16
"""Numbers of experts that are tried between none and all."""


class BlockSensitivity(NamedTuple):
    """One block's experts and what leaving some out costs.

    Attributes:
        partition: of its neurons.
        damage: per scale that may become sparse, nats of KL per pyramid by choice; all experts cost 0.
        skipping: per scale that may be gated, nats of KL per pyramid by the share of tokens that the block computes.
    """

    partition: Partition
    damage: dict[int, dict[Choice, float]]
    skipping: dict[int, dict[float, float]]


def choices(experts: int, prefix_share: float) -> Iterator[Choice]:
    """All choices that are tried: at least ``prefix_share`` of the active experts are always on."""
    step = max(1, experts // LEVELS)
    levels = sorted({*range(0, experts, step), experts})
    for prefix in levels:
        for active in levels:
            if active == experts:
                continue
            if active >= prefix >= round(prefix_share * active):
                yield Choice(prefix, active - prefix)
    yield Choice(experts, 0)


@torch.no_grad()
def expert_damage(
    ffn: Any,
    record: BlockRecord,
    metric: OutputMetric,
    recipe: Recipe,
    schedule: Schedule,
    clustering: Clustering | None = None,
) -> tuple[Partition, dict[int, dict[Choice, float]]]:
    """Partitions a dense FFN into experts and measures every choice of the recipe at every scale.

    Routers are fitted as the conversion fits them, so a choice is measured with the experts that they would pick; an
    inactive expert adds nothing.
    """
    experts, prefix_share, scales = recipe.experts.count, recipe.budget.prefix_share, range(schedule.num_scales)
    shared = experts if prefix_share == 1 else round(prefix_share * experts / 2)
    inputs = torch.cat([record.ffn_input[scale] for scale in scales])
    partition = partition_neurons(ffn, inputs, recipe.experts, shared, recipe.seed, metric.root, clustering)
    order = partition.permutation
    w1, b1 = ffn.fc1.weight[order], None if ffn.fc1.bias is None else ffn.fc1.bias[order]
    w2 = ffn.fc2.weight.T[order].reshape(experts, -1, ffn.fc2.weight.shape[0])

    def hidden(x_TC: Tensor) -> Tensor:
        return F.gelu(F.linear(x_TC, w1, b1), approximate="tanh").view(len(x_TC), experts, -1)

    moments = Moments(inputs.shape[1], experts, inputs.device)
    for x in torch.split(inputs, CHUNK):
        moments.add(x, squared_sizes(hidden(x), w2).clamp_min(0).sqrt())
    weight, bias = (each.to(inputs.dtype) for each in moments.ridge())
    measured, tried = w2.float() @ metric.root, list(choices(experts, prefix_share))
    damage: dict[int, dict[Choice, float]] = {}
    for scale in scales:
        length = schedule.lengths[scale]
        x = record.ffn_input[scale][: max(TOKENS, length) // length * length]
        score = F.linear(x, weight, bias)
        outputs = torch.einsum("ten,enc->tec", hidden(x).float(), measured)
        factor = 0.5 * length * float(metric.scales[scale])
        errors = _errors(outputs, score, tried)
        damage[scale] = {choice: factor * error for choice, error in zip(tried, errors, strict=True)}
    return partition, damage


@torch.no_grad()
def gate_damage(
    block: Any,
    record: BlockRecord,
    metric: OutputMetric,
    rank: int,
    *,
    keeps: Mapping[int, Sequence[float]],
    schedule: Schedule,
) -> dict[int, dict[float, float]]:
    """The damage of skipping tokens by scale and keep ratio, with gate and reconstruction as the conversion fits them.

    That is what reconstructions miss of the skipped tokens' outputs, and what those who would attend to the skipped
    tokens' keys and values miss.

    Args:
        block: dense.
        record: with the states of all scales.
        metric: at the block's output.
        rank: of the reconstruction.
        keeps: keep ratios to try at each scale; empty: nothing is fitted.
        schedule: of the model.
    """
    if not keeps:
        return {}
    like = record.states[0].after
    width = like.shape[-1]
    gate = TokenGate(width).to(like)
    reconstruction = Reconstruction(width, schedule.num_scales, rank).to(like)
    fit_gate(gate, reconstruction, record, schedule, list(keeps))
    damage = {}
    for scale, ratios in keeps.items():
        length = schedule.lengths[scale]
        lost = like.new_zeros(length, dtype=torch.float64)
        context = [0.0] * len(ratios)
        pyramids = 0
        for states in record.states:
            before, after = states.at(schedule.slice(scale))
            missing = after - reconstruction(before, previous_update(states, schedule, scale), scale)
            error_BL = (missing.float() @ metric.root).square().sum(-1)
            order_BL = gate.order(before, gate(before))
            lost += error_BL.gather(1, order_BL).sum(0, dtype=torch.float64)
            missed = _missed_context(block, record.call, states, order_BL, ratios, metric, scale)
            context = [sum(pair) for pair in zip(context, missed, strict=True)]
            pyramids += len(before)
        after_first = 0.5 * float(metric.scales[scale]) / pyramids * lost.flip(0).cumsum(0).flip(0)
        totals = [*after_first.tolist(), 0.0]
        damage[scale] = {
            keep: totals[kept_tokens(keep, length)] + missed / pyramids
            for keep, missed in zip(ratios, context, strict=True)
        }
    return damage


def _missed_context(
    block: Any,
    call: Call,
    states: States,
    order_BL: Tensor,
    ratios: Sequence[float],
    metric: OutputMetric,
    scale: int,
) -> list[float]:
    """Nats of KL, summed over a batch, for attention without the keys and values of the tokens that a scale skips.

    It counts for the tokens of that scale that are kept and for all after it. What an FFN makes of the difference, and
    that later tokens may be skipped themselves, is left out.

    Args:
        order_BL: tokens of the scale, the first to keep first.
        ratios: shares of them that are computed, each of which gets a figure.
    """
    assert states.begin == 0
    x, context, lengths = states.before, states.context, call.span.counts
    begin, length = sum(lengths[:scale]), lengths[scale]
    whole = block.attend(x, context, call)
    place = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    earlier, later = place[:, :begin], place[:, begin + length :]
    weight_L = metric.scales.repeat_interleave(torch.tensor(lengths, device=x.device))
    found = []
    for keep in ratios:
        count = kept_tokens(keep, length)
        if count == length:
            found.append(0.0)
            continue
        rows = torch.cat((earlier, begin + order_BL[:, :count].sort(dim=1).values, later), dim=1)
        counts = (*lengths[:scale], count, *lengths[scale + 1 :])
        missed = (block.attend(take(x, rows), context, call.of(rows, counts)) - take(whole, rows))[:, begin:]
        error_BK = (missed.float() @ metric.root).square().sum(-1) * weight_L[rows[:, begin:]]
        found.append(0.5 * float(error_BK.sum(dtype=torch.float64)))
    return found


def _errors(outputs_TEC: Tensor, score_TE: Tensor, tried: Sequence[Choice]) -> list[float]:
    """Mean squared error of the summed output under each choice, in the coordinates of ``outputs``."""
    T, E, _ = outputs_TEC.shape
    ranks: dict[int, Tensor] = {}
    errors = []
    for prefix, routed in tried:
        if prefix not in ranks:
            order = score_TE[:, prefix:].argsort(dim=1, descending=True, stable=True)
            ranks[prefix] = order.argsort(dim=1)
        inactive_TE = outputs_TEC.new_zeros(T, E)
        inactive_TE[:, prefix:] = (ranks[prefix] >= routed).to(inactive_TE.dtype)
        lost = torch.bmm(inactive_TE.unsqueeze(1), outputs_TEC).squeeze(1)
        errors.append(lost.square().sum(1).mean())
    found: list[float] = torch.stack(errors).tolist()
    return found
