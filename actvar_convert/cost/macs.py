"""What one image costs in multiply-adds, by arithmetic on configuration and plan alone.

Convention, the only place that states it:

- One MAC is one multiply-add; 1 MAC = 2 FLOPs. The unit is one image, generated scale by scale with a cache of keys
  and values.
- A family prices the parts of its network (``models.base.Costs``): matrix products, convolutions, and attention's
  scores and weighted sums over the context that is there (a token of scale s attends to the scales 0 to s). What a
  class or a text fixes, such as AdaLN, is priced once per image, for dense and sparse alike. The decoder is all that
  leads from tokens to an image, its convolutions and the products of its attention.
- The method prices what it changes: of the FFN a sparse block runs its prefix and the K routed experts of the plan;
  router, token gate and low-rank reconstruction come to it.
- Guidance runs every row twice, with the condition and without, and doubles all of the transformer but what is the same
  for both, such as VAR's word embedding. A plan that folds guidance into the predictions runs one row. The decoder sees
  one row either way.
- A token that a block skips pays for its share of the gate, if there is something to choose, and for the low-rank map
  of the reconstruction. It has no key and value: the context of that block is shorter by it, at this scale and later.
- Left out: what ``NOT_COUNTED`` lists. Elementwise are also the alpha product and the bilinear upsampling of the
  reconstruction; table look-ups are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from actvar_convert.models.base import Config
from actvar_convert.models.families import family_of
from actvar_convert.plan import SparsityPlan

FLOPS_PER_MAC = 2

NOT_COUNTED = (
    "norms",
    "activations",
    "softmax",
    "biases",
    "elementwise products and sums",
    "interpolation",
    "sampling",
    "gather and scatter",
)


def rows(guidance: bool, plan: SparsityPlan | None = None) -> int:
    """Rows of the transformer per image; ``plan`` None is the dense model."""
    return 1 if not guidance else 2 if plan is None else plan.rows


def context_tokens(config: Config, plan: SparsityPlan, block: int, scale: int) -> int:
    """Tokens whose keys and values a token of one scale meets in one block."""
    pyramid = config.schedule
    return sum(plan.blocks[block].kept(s, pyramid.lengths[s]) for s in range(scale + 1))


def block_macs(config: Config, plan: SparsityPlan, block: int, scale: int) -> dict[str, int]:
    """MACs of one block at one scale for one row, by component: the family's, then those of the method.

    With C the width, F the family's price of a token in the whole FFN, a of E experts active, k of L tokens kept: FFN
    F k a / E, router C E_r k over E_r routed experts, gate C L unless k is 0 or L, reconstruction 2 C r (L - k).
    """
    costs, C, length = family_of(config).costs(config), config.width, config.schedule.lengths[scale]
    kept = plan.blocks[block].kept(scale, length)
    skipped = length - kept
    return {
        **costs.block(kept, context_tokens(config, plan, block, scale)),
        "ffn": round(kept * plan.active(block, scale) * costs.ffn() / plan.experts),
        "router": kept * C * plan.router_experts(block) if plan.routes(block, scale) else 0,
        "gate": length * C if 0 < kept < length else 0,
        "reconstruction": 2 * C * plan.reconstruction_rank * skipped,
    }


class PlanMacs(NamedTuple):
    """MACs of one image by component, apart for every place.

    Attributes:
        cells: of every block, at every scale.
        blocks: of every block, once an image.
        scales: of every scale, outside of the blocks.
        image: what belongs to neither.
    """

    cells: list[list[dict[str, int]]]
    blocks: list[dict[str, int]]
    scales: list[dict[str, int]]
    image: dict[str, int]

    @property
    def components(self) -> dict[str, int]:
        """Of the whole transformer."""
        return added([*(cell for block in self.cells for cell in block), *self.blocks, self.image, *self.scales])


def plan_macs(config: Config, plan: SparsityPlan | None, guidance: bool = True) -> PlanMacs:
    """Prices the transformer for one image; ``plan`` None is the dense model."""
    plan, costs = plan or SparsityPlan.dense(config), family_of(config).costs(config)
    count, scales, blocks = rows(guidance, plan), range(config.schedule.num_scales), range(config.depth)
    return PlanMacs(
        cells=[[_times(block_macs(config, plan, block, scale), count) for scale in scales] for block in blocks],
        blocks=[_times(costs.block_once(), count) for _ in blocks],
        scales=[added([costs.once(scale), _times(costs.scale(scale), count)]) for scale in scales],
        image=_times(costs.image(), count),
    )


def transformer_macs(config: Config, plan: SparsityPlan | None, guidance: bool = True) -> int:
    """MACs of the transformer per image, as one number; ``plan`` None is the dense model."""
    return sum(plan_macs(config, plan, guidance).components.values())


def added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum by component, in the order of their first appearance."""
    total: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def _times(macs: Mapping[str, int], factor: int) -> dict[str, int]:
    return {name: factor * value for name, value in macs.items()}
