"""Dynamic numbers of experts: thresholds on the router's scores that meet a plan's K on average.

A token whose scores are led by one expert then runs few, one whose scores are even runs many.

Shapes: T tokens, F experts after the prefix, C width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from actvar_convert.conversion.activations import first_states
from actvar_convert.conversion.experts import as_maps
from actvar_convert.models.experts import ExpertFFN, select_experts
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.plan import BlockPlan, SparsityPlan

RETUNED_ON = 64
"""Pyramids on which thresholds are set again."""


def threshold_for(score_TF: Tensor, routed: int) -> tuple[float, float]:
    """The threshold tau under which the tokens run ``routed`` experts on average, and how many they run then.

    An expert runs where its score is at least (1 - tau) of the token's largest; scores below 0 never do, so the average
    may stay below what was asked for.
    """
    share = score_TF / score_TF.amax(-1, keepdim=True).clamp_min(1e-12)
    last = share.flatten().sort(descending=True).values[routed * len(score_TF) - 1]
    tau = 1 - float(last.clamp(0, 1))
    return tau, float(select_experts(score_TF, 0, tau).float().sum(-1).mean())


@torch.no_grad()
def set_thresholds(ffn: ExpertFFN, inputs: list[Tensor]) -> None:
    """Gives every plan of an FFN thresholds at the scales where its router picks a fixed K; the K is met on average.

    Args:
        ffn: with routers started. Its plans are replaced, those of the model are left to the caller.
        inputs: FFN inputs [T_s, C] of every scale; whole maps where a neighbourhood of tokens shares its experts.
    """
    own = next(name for name, plan in ffn.plans.items() if plan == ffn.plan)
    for name, plan in list(ffn.plans.items()):
        ffn.plan, block = plan, plan.blocks[ffn.block]
        scales = range(len(inputs))
        taus = list(block.threshold or (None for _ in scales))
        means = [block.routed_cost(scale) for scale in scales]
        for scale, x in enumerate(inputs):
            if taus[scale] is None and plan.routes(ffn.block, scale):
                score = ffn.scores(as_maps(ffn, x, scale), scale).flatten(0, 1)
                taus[scale], means[scale] = threshold_for(score, block.routed[scale])
        if any(tau is not None for tau in taus):
            dynamic = block.model_copy(update={"threshold": tuple(taus), "mean_routed": tuple(means)})
            blocks = (*plan.blocks[: ffn.block], dynamic, *plan.blocks[ffn.block + 1 :])
            ffn.plans[name] = plan.model_copy(update={"blocks": blocks})
    ffn.plan = ffn.plans[own]


@torch.no_grad()
def retuned_plans(
    model: SparseVARModel, tokens_PL: Tensor, labels_P: Tensor, given: Mapping[str, SparsityPlan], *, batch: int
) -> dict[str, SparsityPlan]:
    """The model's plans with thresholds that meet their K on what the sparse model itself computes.

    Block after block: a threshold is set on the scores that the model has with those before it set already.

    Args:
        model: left as it is.
        tokens_PL, labels_P: teacher pyramids and their classes; the first ``RETUNED_ON`` are looked at, every fourth of
            which is replaced by the null class.
        given: plans whose thresholds were chosen by hand, by name; those stay.
        batch: pyramids that run at once; the thresholds are the same for any but for rounding.
    """
    transformer, own, before = model.transformer, model.plan_name, model.plans
    tokens, labels = tokens_PL[:RETUNED_ON].long(), labels_P[:RETUNED_ON]
    retuned = {}
    try:
        for name, plan in before.items():
            model.use_plan(name)
            states, conditions = first_states(model, tokens, labels, batch)
            span, mask = transformer.forced(states[0])
            for layer in transformer.sparse_layers:
                hand = given[name].blocks[layer.index] if name in given else None
                block = plan.blocks[layer.index]
                dynamic = [s for s in range(len(block.routed)) if block.tau(s) is not None]
                free = [s for s in dynamic if hand is None or hand.tau(s) is None]
                if free:
                    with _noted_scores(layer.ffn) as scores:
                        for x, condition in zip(states, conditions, strict=True):
                            layer(x, layer.modulation(*condition), span, mask)
                    taus = {s: threshold_for(torch.cat(scores[s]), block.routed[s]) for s in free if s in scores}
                    blocks = list(plan.blocks)
                    blocks[layer.index] = _with_thresholds(block, taus)
                    plan = layer.ffn.plan = plan.model_copy(update={"blocks": tuple(blocks)})
                for number, condition in enumerate(conditions):
                    states[number] = layer(states[number], layer.modulation(*condition), span, mask)
            retuned[name] = plan
    finally:
        model.use_plan(own)
    return retuned


@contextmanager
def _noted_scores(ffn: ExpertFFN) -> Iterator[dict[int, list[Tensor]]]:
    """Notes, by scale, the scores [T, F] that an FFN's thresholds are applied to."""
    seen: dict[int, list[Tensor]] = {}
    select = ffn.select

    def noting(score_BLF: Tensor, scale: int) -> Tensor:
        seen.setdefault(scale, []).append(score_BLF.flatten(0, 1))
        return select(score_BLF, scale)

    ffn.select = noting  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del ffn.select


def _with_thresholds(block: BlockPlan, found: Mapping[int, tuple[float, float]]) -> BlockPlan:
    """A block's plan with other thresholds, and the mean K that they lead to, at some scales."""
    if block.threshold is None or block.mean_routed is None:
        return block
    scales = range(len(block.threshold))
    kept = {scale: (block.threshold[scale], block.mean_routed[scale]) for scale in scales}
    taus, means = zip(*({**kept, **found}[scale] for scale in scales), strict=True)
    return block.model_copy(update={"threshold": taus, "mean_routed": means})
