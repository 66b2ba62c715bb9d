"""Dynamic numbers of experts: thresholds on the router's scores that meet a plan's K on average.

A token whose scores are led by one expert then runs few, one whose scores are even runs many.

Shapes: T tokens, F experts after the prefix, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actvar_convert.convert.experts import as_maps
from actvar_convert.models.experts import ExpertFFN, select_experts


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
