"""The FLOPs report: dense against sparse per component, block and scale, from configuration and plans alone.

The convention: ``actvar_convert.cost.macs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from actvar_convert.cost import macs as costs
from actvar_convert.errors import InputError, RecipeError
from actvar_convert.models.base import Config
from actvar_convert.models.families import family_of
from actvar_convert.plan import SparsityPlan


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(_Value):
    """Work for one image."""

    flops: int = Field(description="floating-point operations, two per multiply-add")
    macs: int = Field(description="multiply-adds")

    @classmethod
    def of(cls, macs: int) -> Cost:
        return cls(flops=costs.FLOPS_PER_MAC * macs, macs=macs)


class Convention(_Value):
    """What the figures mean."""

    flops_per_mac: int = costs.FLOPS_PER_MAC
    guidance: bool = Field(description="two rows per image, with and without the class")
    batch: int = Field(default=1, description="images that the figures are for")
    adaln: Literal["once per image"] = "once per image"
    not_counted: tuple[str, ...] = costs.NOT_COUNTED


class Cell(Cost):
    """One block at one scale, without AdaLN."""

    active: float = Field(description="share of the FFN's neurons that a computed token runs, 0 to 1")
    kept: float = Field(description="share of the tokens that the block computes, 0 to 1")


class BlockCost(Cost):
    """One block over all scales, its own AdaLN included."""

    block: int
    components: dict[str, Cost]
    scales: tuple[Cell, ...]


class ScaleCost(Cost):
    """One scale over all blocks, word embedding and head included; AdaLN, once per image, belongs to no scale."""

    scale: int
    side: int = Field(description="tokens per side of the scale's map; rows if it is no square")
    columns: int | None = Field(None, description="tokens of a row of the map, if it is no square")
    tokens: int
    components: dict[str, Cost]


class ModelCost(_Value):
    """What one model costs per image.

    ``vqvae_decoder`` among the components, and ``end_to_end``, are there when the tokenizer is known.
    """

    components: dict[str, Cost]
    transformer: Cost
    end_to_end: Cost | None = None
    per_scale: tuple[ScaleCost, ...]
    per_block: tuple[BlockCost, ...]


class Reduction(_Value):
    """Fraction of the dense cost that is saved."""

    transformer: float
    end_to_end: float | None = None


class PlanCost(_Value):
    """Cost and saving of one plan."""

    sparse: ModelCost
    reduction: Reduction


class FlopsReport(_Value):
    """FLOPs of a dense model, and of its sparse version under one or several plans."""

    format: Literal["actvar.flops/1"] = Field(default="actvar.flops/1", alias="schema")
    convention: Convention
    dense: ModelCost
    sparse: ModelCost | None = None
    reduction: Reduction | None = None
    plan: str | None = Field(default=None, description="name of the plan that ``sparse`` and ``reduction`` are for")
    plans: dict[str, PlanCost] | None = Field(default=None, description="the model's other plans")

    def to_json(self) -> str:
        """The report as one JSON object, schema ``actvar.flops/1``; what does not apply is absent."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2)

    def promised_speedup(self, with_decoder: bool = False) -> float | None:
        """Dense cost divided by sparse cost: the speed-up if time followed FLOPs; None if one is not known."""
        dense, sparse = (
            None if each is None else each.end_to_end if with_decoder else each.transformer
            for each in (self.dense, self.sparse)
        )
        return dense.macs / sparse.macs if dense and sparse and sparse.macs else None


def count_flops(
    config: Config,
    tokenizer: Any | None = None,
    plans: Mapping[str, SparsityPlan] | None = None,
    default: str | None = None,
    guidance: bool = True,
) -> FlopsReport:
    """Prices a model per image; neither weights nor network are needed.

    Args:
        config: shape of the transformer.
        tokenizer: shape of the VQVAE; None leaves the decoder and the end-to-end figures out.
        plans: sparsity plans by name; None or empty for a dense model.
        default: the plan that ``sparse`` is about; may be left out when there is only one.
        guidance: with classifier-free guidance.

    Raises:
        RecipeError: a plan does not fit the transformer.
        InputError: ``default`` is not among the plans.
    """
    plans = dict(plans or {})
    problems = [f"{name}: {problem}" for name, plan in plans.items() for problem in plan.problems(config)]
    if problems:
        raise RecipeError("the sparsity plans do not fit the model:", problems)
    if plans and default is None and len(plans) == 1:
        default = next(iter(plans))
    if (plans or default is not None) and default not in plans:
        known = ", ".join(sorted(plans)) or "none"
        named = "name the plan to report on" if default is None else f"there is no plan {default!r}"
        raise InputError(f"{named}; the model's plans: {known}")

    decoder = None if tokenizer is None else family_of(config).decoder_macs(tokenizer)
    dense = _model_cost(config, SparsityPlan.dense(config), decoder, guidance)
    priced = {name: _plan_cost(config, plan, decoder, guidance, dense) for name, plan in plans.items()}
    chosen = priced.pop(default) if default is not None else None
    return FlopsReport(
        convention=Convention(guidance=guidance),
        dense=dense,
        sparse=chosen.sparse if chosen else None,
        reduction=chosen.reduction if chosen else None,
        plan=default,
        plans=priced or None,
    )


def _plan_cost(config: Config, plan: SparsityPlan, decoder: int | None, guidance: bool, dense: ModelCost) -> PlanCost:
    sparse = _model_cost(config, plan, decoder, guidance)
    end_to_end = None
    if dense.end_to_end is not None and sparse.end_to_end is not None:
        end_to_end = 1 - sparse.end_to_end.macs / dense.end_to_end.macs
    reduction = Reduction(transformer=1 - sparse.transformer.macs / dense.transformer.macs, end_to_end=end_to_end)
    return PlanCost(sparse=sparse, reduction=reduction)


def _model_cost(config: Config, plan: SparsityPlan, decoder: int | None, guidance: bool) -> ModelCost:
    pyramid, priced = config.schedule, costs.plan_macs(config, plan, guidance)
    per_scale = []
    for s, outside in enumerate(priced.scales):
        macs = costs.added([*(block[s] for block in priced.cells), outside])
        rows, columns = pyramid.maps[s]
        shape = {"scale": s, "side": rows, "columns": None if rows == columns else columns, "tokens": rows * columns}
        per_scale.append(ScaleCost(**shape, components=_costs(macs), **_total(macs)))

    per_block = []
    for b, (cells, once) in enumerate(zip(priced.cells, priced.blocks, strict=True)):
        macs = costs.added([*cells, once])
        row = tuple(
            Cell(
                active=plan.active(b, s) / plan.experts,
                kept=plan.blocks[b].kept(s, pyramid.lengths[s]) / pyramid.lengths[s],
                **_total(cell),
            )
            for s, cell in enumerate(cells)
        )
        per_block.append(BlockCost(block=b, components=_costs(macs), scales=row, **_total(macs)))

    whole = priced.components
    transformer = sum(whole.values())
    return ModelCost(
        components=_costs(whole if decoder is None else {**whole, "vqvae_decoder": decoder}),
        transformer=Cost.of(transformer),
        end_to_end=None if decoder is None else Cost.of(transformer + decoder),
        per_scale=tuple(per_scale),
        per_block=tuple(per_block),
    )


def _costs(macs: Mapping[str, int]) -> dict[str, Cost]:
    return {name: Cost.of(value) for name, value in macs.items()}


def _total(macs: Mapping[str, int]) -> dict[str, int]:
    total = sum(macs.values())
    return {"flops": costs.FLOPS_PER_MAC * total, "macs": total}
