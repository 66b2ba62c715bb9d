"""How evenly routers share their tokens out: seen while a model runs, nothing of it changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from actvar_convert.measure.quality_report import RoutingLoad
from actvar_convert.models.base import Span
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.model import Model
from actvar_convert.models.split import expert_ffns


class RoutingWatch:
    """Counts of what the routers of a model chose, by block and scale."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[int, int], int] = {}
        self._chosen: dict[tuple[int, int], Tensor] = {}

    def add(self, block: int, scale: int, selected_TF: Tensor) -> None:
        """Counts a boolean choice of some tokens."""
        key, counts = (block, scale), selected_TF.sum(0).double().cpu()
        self._tokens[key] = self._tokens.get(key, 0) + len(selected_TF)
        self._chosen[key] = self._chosen[key] + counts if key in self._chosen else counts

    def loads(self, model: Model) -> tuple[RoutingLoad, ...]:
        """What was chosen, by block and scale; empty if nothing routes."""
        found = []
        for (block, scale), counts in sorted(self._chosen.items(), key=lambda item: item[0]):
            load = counts / self._tokens[block, scale]
            found.append(
                RoutingLoad(
                    block=block,
                    scale=scale,
                    tokens=self._tokens[block, scale],
                    load=tuple(load.tolist()),
                    active=model.plan.blocks[block].routed[scale],
                    balance=_evenness(load),
                )
            )
        return tuple(found)


def _evenness(load_F: Tensor) -> float:
    """Entropy of how the choices are shared out, over its largest value: 1 all alike, 0 one expert alone."""
    share = load_F / load_F.sum().clamp_min(1e-300)
    return float(torch.special.entr(share).sum()) / math.log(len(share)) if len(share) > 1 else 1.0


def experts_per_token(loads: Sequence[RoutingLoad]) -> float:
    """Routed experts per token over some blocks and scales."""
    tokens = max(1, sum(each.tokens for each in loads))
    return sum(each.active * each.tokens for each in loads) / tokens


@contextmanager
def watched_routing(model: Model) -> Iterator[RoutingWatch]:
    """Counts the choices of a model's routers while the block runs, by hooks in front of its FFNs."""
    watch = RoutingWatch()
    ffns = list(expert_ffns(model.transformer))

    def before(ffn: nn.Module, given: tuple[Tensor, Span]) -> None:
        assert isinstance(ffn, ExpertFFN)
        x_BLC, span = given
        for scale, part in enumerate(torch.split(x_BLC, list(span.counts), dim=1), span.first):
            if part.shape[1] and ffn.plans.current.routes(ffn.index, scale):
                watch.add(ffn.index, scale, ffn.route(part, scale).flatten(0, 1))

    hooks = [ffn.register_forward_pre_hook(before) for ffn in ffns]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
