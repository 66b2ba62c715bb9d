"""How evenly routers share their tokens out: seen while a model runs, nothing of it changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from actvar_convert.measure.quality_report import RoutingLoad
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel


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

    def loads(self, model: VARModel) -> tuple[RoutingLoad, ...]:
        """What was chosen, by block and scale; empty if nothing routes."""
        found = []
        for (block, scale), counts in sorted(self._chosen.items(), key=lambda item: item[0]):
            assert isinstance(model, SparseVARModel)
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
def watched_routing(model: VARModel) -> Iterator[RoutingWatch]:
    """Counts the choices of a model's routers while the block runs."""
    watch = RoutingWatch()
    ffns = [layer.ffn for layer in model.transformer.sparse_layers] if isinstance(model, SparseVARModel) else []
    try:
        for ffn in ffns:
            ffn.scores = _watching(ffn, watch)  # type: ignore[method-assign]
        yield watch
    finally:
        for ffn in ffns:
            ffn.__dict__.pop("scores", None)


def _watching(ffn: ExpertFFN, watch: RoutingWatch) -> Callable[..., Tensor]:
    scores = ffn.scores

    @functools.wraps(scores)
    def watching(x_BLC: Tensor, scale: int) -> Tensor:
        score = scores(x_BLC, scale)
        watch.add(ffn.block, scale, ffn.select(score, scale).flatten(0, 1))
        return score

    return watching
