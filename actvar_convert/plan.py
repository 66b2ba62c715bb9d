"""SparsityPlan: every sparsity setting of a model, as one frozen value.

The model executes a plan, the FLOPs report prices it, the budget search proposes it, a checkpoint stores it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

GuidanceKind = Literal["paired", "folded"]


class BackboneShape(Protocol):
    """What a plan has to fit: blocks, scales, hidden neurons of an FFN, channels."""

    @property
    def depth(self) -> int: ...
    @property
    def num_scales(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def width(self) -> int: ...


def kept_tokens(keep: float, length: int) -> int:
    """Tokens computed out of ``length``: the keep ratio rounded up."""
    return min(length, math.ceil(keep * length - 1e-9))


class BlockPlan(BaseModel):
    """Sparsity of one block; every tuple has one entry per scale, coarse to fine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: tuple[int, ...] = Field(description="experts n that every token runs: the first n of the block")
    routed: tuple[int, ...] = Field(description="experts K that the router picks per token beyond the prefix")
    keep: tuple[float, ...] = Field(description="share of the tokens that the block computes, 0 to 1")

    def kept(self, scale: int, length: int) -> int:
        """Tokens computed out of ``length`` at one scale."""
        return kept_tokens(self.keep[scale], length)


class SparsityPlan(BaseModel):
    """All sparsity settings of a model.

    A token at scale s of block l runs the first ``prefix[s]`` experts and ``routed[s]`` more, chosen by the router
    among the rest; the block computes ``ceil(keep[s] * L_s)`` tokens and reconstructs the others, whose keys and values
    are left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int = Field(ge=1, description="experts E per FFN; divides the hidden neurons H")
    blocks: tuple[BlockPlan, ...]
    reconstruction_rank: int = Field(
        16, ge=0, description="rank of the low-rank map of the reconstruction; 0: the previous scale's update alone"
    )
    guidance: GuidanceKind = Field(
        "paired",
        description="paired: every image runs with its class and without, and sampling combines the two predictions; "
        "folded: it runs once, and its predictions are meant to be the combined ones, which distillation teaches",
    )

    @classmethod
    def dense(cls, config: BackboneShape, experts: int = 1) -> SparsityPlan:
        """The plan that runs everything: all experts in the prefix, all tokens kept."""
        scales = config.num_scales
        block = BlockPlan(prefix=(experts,) * scales, routed=(0,) * scales, keep=(1.0,) * scales)
        return cls(experts=experts, blocks=(block,) * config.depth)

    @property
    def rows(self) -> int:
        """Rows of the transformer that generation runs per image."""
        return 1 if self.guidance == "folded" else 2

    @property
    def gated(self) -> bool:
        """Whether any block skips tokens."""
        return any(keep < 1 for block in self.blocks for keep in block.keep)

    def block_gated(self, block: int) -> bool:
        """Whether one block skips tokens at any scale."""
        return any(keep < 1 for keep in self.blocks[block].keep)

    def router_experts(self, block: int) -> int:
        """Experts that a block's router scores: those after the smallest prefix of a scale that routes; 0: none."""
        plan = self.blocks[block]
        prefixes = [n for scale, n in enumerate(plan.prefix) if self.routes(block, scale)]
        return self.experts - min(prefixes) if prefixes else 0

    def routes(self, block: int, scale: int) -> bool:
        """Whether the router of a block has anything to choose at a scale."""
        plan = self.blocks[block]
        return 0 < plan.routed[scale] < self.experts - plan.prefix[scale]

    def runs_all(self, block: int, scale: int) -> bool:
        """Whether every token runs every expert of a block at a scale."""
        return self.active(block, scale) == self.experts

    def active(self, block: int, scale: int) -> int:
        """Experts per token that run at a scale: prefix and routed."""
        plan = self.blocks[block]
        return plan.prefix[scale] + plan.routed[scale]

    def problems(self, config: BackboneShape) -> list[str]:
        """Everything that keeps a model of this shape from executing the plan; empty when it fits."""
        found = []
        scales = config.num_scales
        if config.hidden % self.experts:
            found.append(f"plan.experts: {self.experts} does not divide the {config.hidden} hidden neurons of an FFN")
        if len(self.blocks) != config.depth:
            found.append(f"plan.blocks: {len(self.blocks)} blocks given, the model has {config.depth}")
        for index, block in enumerate(self.blocks):
            where = f"plan.blocks[{index}]"
            columns = {"prefix": block.prefix, "routed": block.routed, "keep": block.keep}
            wrong = {name: len(values) for name, values in columns.items() if len(values) != scales}
            if wrong:
                found += [f"{where}.{name}: {n} given, the model has {scales} scales" for name, n in wrong.items()]
                continue
            for s in range(scales):
                n, k = block.prefix[s], block.routed[s]
                if n < 0 or k < 0 or n + k > self.experts:
                    found.append(
                        f"{where}: prefix {n} + routed {k} at scale {s} is not within 0 to {self.experts} experts"
                    )
                if not 0 <= block.keep[s] <= 1:
                    found.append(f"{where}.keep[{s}]: {block.keep[s]} is not within 0 to 1")
        if self.gated and self.reconstruction_rank > config.width:
            found.append(
                f"plan.reconstruction_rank: {self.reconstruction_rank} exceeds the width of the model, {config.width}"
            )
        return found


@dataclass
class Plans:
    """The plans that one set of weights can run, and the one that it runs now; all modules of the method share it.

    Attributes:
        named: by name.
        name: of the plan that runs.
    """

    named: Mapping[str, SparsityPlan]
    name: str

    @property
    def current(self) -> SparsityPlan:
        return self.named[self.name]

    def __iter__(self) -> Iterator[SparsityPlan]:
        return iter(self.named.values())

    @contextmanager
    def using(self, name: str) -> Iterator[SparsityPlan]:
        """Runs another plan for a while."""
        before, self.name = self.name, name
        try:
            yield self.current
        finally:
            self.name = before

    def gated(self, block: int) -> list[SparsityPlan]:
        """Plans that skip tokens in a block."""
        return [plan for plan in self if plan.block_gated(block)]

    def problems(self, config: BackboneShape) -> list[str]:
        """Everything that keeps a model of this shape from running all plans with one set of weights."""
        found = [f"{name}: {problem}" for name, plan in self.named.items() for problem in plan.problems(config)]
        gating = {name: plan for name, plan in self.named.items() if plan.gated}
        for field, concerned in (("experts", self.named), ("guidance", self.named), ("reconstruction_rank", gating)):
            values = {name: getattr(plan, field) for name, plan in concerned.items()}
            if len(set(values.values())) > 1:
                found.append(f"plans of one model must agree on {field}, given {values}")
        return found
