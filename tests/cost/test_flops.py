import json
import math
from itertools import pairwise

import pytest

from actvar_convert.cost import macs as costs
from actvar_convert.cost.flops import FlopsReport, count_flops
from actvar_convert.errors import InputError, RecipeError
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.family import decoder_macs
from actvar_convert.plan import BlockPlan, SparsityPlan

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

TINY = TransformerConfig(depth=2, width=8, heads=2, hidden=16, sides=(1, 2), vocab=10, z_channels=4, classes=3)

COMPONENTS = (
    *("attention_projections", "attention_products", "ffn", "router", "gate", "reconstruction"),
    *("adaln", "word_embedding", "head", "vqvae_decoder"),
)


def official(depth: int) -> TransformerConfig:
    return TransformerConfig(
        depth=depth,
        width=64 * depth,
        heads=depth,
        hidden=256 * depth,
        sides=SIDES_512 if depth == 36 else SIDES_256,
        vocab=4096,
        z_channels=32,
        classes=1000,
        shared_adaln=depth == 36,
    )


def tokenizer(sides: tuple[int, ...] = SIDES_256) -> TokenizerConfig:
    return TokenizerConfig(ch=160, ch_mult=(1, 1, 2, 2, 4), res_blocks=2, vocab=4096, z_channels=32, sides=sides)


def uniform(
    config: TransformerConfig,
    *,
    experts: int = 4,
    prefix: int = 1,
    routed: int = 1,
    keep: float = 0.5,
    reconstruction_rank: int = 4,
    **rest,
) -> SparsityPlan:
    scales = config.schedule.num_scales
    block = BlockPlan(prefix=(prefix,) * scales, routed=(routed,) * scales, keep=(keep,) * scales)
    blocks = (block,) * config.depth
    return SparsityPlan(experts=experts, blocks=blocks, reconstruction_rank=reconstruction_rank, **rest)


def giga(cost) -> float:
    assert cost.flops == 2 * cost.macs
    return cost.flops / 1e9


@pytest.mark.parametrize(
    ("depth", "linears", "products", "head"),
    [
        (16, 547.6, 37.5, 11.4),
        (20, 1069.5, 58.7, 14.3),
        (24, 1848.2, 84.5, 17.1),
        (30, 3609.7, 132.0, 21.4),
        (36, 20547.4, 2169.7, 84.6),
    ],
)
def test_official_sizes_with_guidance(depth, linears, products, head):
    dense = count_flops(official(depth)).dense.components
    assert giga(dense["attention_projections"]) + giga(dense["ffn"]) == pytest.approx(linears, abs=0.05)
    assert giga(dense["attention_products"]) == pytest.approx(products, abs=0.05)
    assert giga(dense["head"]) == pytest.approx(head, abs=0.05)


def test_d16_agrees_with_the_reference_implementation():
    report = count_flops(official(16), tokenizer())
    dense = {name: giga(cost) for name, cost in report.dense.components.items()}
    linear = sum(dense[name] for name in ("attention_projections", "ffn", "word_embedding", "head"))
    assert linear + 10 * dense["adaln"] == pytest.approx(563.17, abs=0.005)
    assert dense["adaln"] == pytest.approx(0.4, abs=0.05)
    assert dense["ffn"] / giga(report.dense.transformer) == pytest.approx(0.61, abs=0.005)

    convolutions, attention, phi = (2 * macs / 1e9 for macs in decoder_macs(tokenizer()))
    assert convolutions == pytest.approx(393.04, abs=0.005)
    assert attention == pytest.approx(0.67, abs=0.005)
    assert phi == pytest.approx(0.05, abs=0.005)
    assert dense["vqvae_decoder"] == pytest.approx(convolutions + attention + phi)
    assert giga(report.dense.end_to_end) == pytest.approx(giga(report.dense.transformer) + dense["vqvae_decoder"])


def test_hand_count_dense():
    # L = (1, 4), T = (1, 5), C = 8, H = 16, D = 2, V = 10, z = 4, one row per image.
    macs = {name: cost.macs for name, cost in count_flops(TINY, guidance=False).dense.components.items()}
    assert macs == {
        "attention_projections": 2 * (1 + 4) * 4 * 8 * 8,
        "attention_products": 2 * (1 * 1 + 4 * 5) * 2 * 8,
        "ffn": 2 * (1 + 4) * 2 * 8 * 16,
        "router": 0,
        "gate": 0,
        "reconstruction": 0,
        "adaln": 2 * 8 * 48 + 8 * 16,
        "word_embedding": 4 * 4 * 8,
        "head": 5 * 8 * 10,
    }
    guided = {name: cost.macs for name, cost in count_flops(TINY).dense.components.items()}
    assert guided == {name: value * (1 if name == "word_embedding" else 2) for name, value in macs.items()}


def test_hand_count_shared_adaln():
    shared = TransformerConfig(**TINY.model_dump() | {"shared_adaln": True})
    dense = count_flops(shared, guidance=False).dense
    assert dense.components["adaln"].macs == 8 * 48 + 8 * 16
    assert all(block.components["adaln"].macs == 0 for block in dense.per_block)


def test_hand_count_sparse():
    # Block 0 is dense. Block 1 at scale 1: 2 of 4 tokens, 1 of 4 experts always, 1 of the other 3 routed, rank 3.
    dense = BlockPlan(prefix=(4, 4), routed=(0, 0), keep=(1.0, 1.0))
    sparse = BlockPlan(prefix=(4, 1), routed=(0, 1), keep=(1.0, 0.5))
    plan = SparsityPlan(experts=4, blocks=(dense, sparse), reconstruction_rank=3)
    report = count_flops(TINY, None, {"only": plan}, guidance=False)
    block0, block1 = report.sparse.per_block
    assert {n: c.macs for n, c in block0.components.items()} == {
        n: c.macs for n, c in report.dense.per_block[0].components.items()
    }
    assert {name: cost.macs for name, cost in block1.components.items()} == {
        "attention_projections": (1 + 2) * 4 * 8 * 8,
        "attention_products": (1 * 1 + 2 * 3) * 2 * 8,
        "ffn": 1 * 2 * 8 * 16 + 2 * (2 * 4) * 2 * 8,
        "router": 2 * 8 * 3,
        "gate": 4 * 8,
        "reconstruction": 2 * (2 * 8 * 3),
        "adaln": 8 * 48,
    }
    assert [(cell.active, cell.kept) for cell in block1.scales] == [(1.0, 1.0), (0.5, 0.5)]
    assert report.plan == "only" and report.plans is None
    saved = report.dense.transformer.macs - report.sparse.transformer.macs
    assert report.reduction.transformer == pytest.approx(saved / report.dense.transformer.macs)
    assert report.reduction.end_to_end is None


def test_tokens_dropped_at_an_earlier_scale_shorten_the_context():
    config = TransformerConfig(**TINY.model_dump() | {"sides": (1, 2, 3)})
    block = BlockPlan(prefix=(1, 1, 1), routed=(0, 0, 0), keep=(1.0, 0.5, 1.0))
    plan = SparsityPlan(experts=1, blocks=(block, block))
    assert [costs.context_tokens(config, plan, 0, scale) for scale in range(3)] == [1, 3, 12]


@pytest.mark.parametrize("rank", [0, 7])
def test_a_reconstruction_costs_its_rank(rank):
    plan = uniform(TINY, reconstruction_rank=rank)
    assert costs.block_macs(TINY, plan, 0, 1)["reconstruction"] == 2 * 8 * rank * 2


def test_dense_plan_costs_what_the_dense_model_costs():
    config = official(16)
    report = count_flops(config, tokenizer(), {"all": SparsityPlan.dense(config, experts=16)})
    assert report.sparse == report.dense
    assert report.reduction.transformer == report.reduction.end_to_end == 0
    assert report.promised_speedup() == report.promised_speedup(with_decoder=True) == 1


@pytest.mark.parametrize("guidance", [True, False])
def test_parts_add_up_to_the_whole(guidance):
    config = official(16)
    plan = uniform(config, experts=16, prefix=3, routed=5, keep=0.6)
    report = count_flops(config, tokenizer(), {"plan": plan}, guidance=guidance)
    for model in (report.dense, report.sparse):
        parts = {name: cost.macs for name, cost in model.components.items()}
        decoder = parts.pop("vqvae_decoder")
        assert model.transformer.macs == sum(parts.values()) == model.end_to_end.macs - decoder
        assert sum(scale.macs for scale in model.per_scale) == model.transformer.macs - parts["adaln"]
        no_block = parts["head"] + parts["word_embedding"] + sum(costs.plan_macs(config, None, guidance).image.values())
        assert sum(block.macs for block in model.per_block) == model.transformer.macs - no_block
        for part in (*model.per_scale, *model.per_block):
            assert part.macs == sum(cost.macs for cost in part.components.values())
        for block in model.per_block:
            assert sum(cell.macs for cell in block.scales) == block.macs - block.components["adaln"].macs
        cells = [block.macs for block in model.per_block]
        assert len(cells) == 16 and len(model.per_scale) == 10
    assert report.sparse.transformer.macs == costs.transformer_macs(config, plan, guidance)
    assert report.dense.transformer.macs == costs.transformer_macs(config, None, guidance)


def test_cost_grows_with_experts_and_kept_tokens():
    config = official(16)

    def total(**settings) -> int:
        return costs.transformer_macs(config, uniform(config, experts=16, **settings))

    by_routed = [total(prefix=2, routed=k, keep=1.0) for k in range(1, 14)]
    by_keep = [total(prefix=2, routed=4, keep=keep / 10) for keep in range(0, 10)]
    for series in (by_routed, by_keep):
        assert all(a < b for a, b in pairwise(series))
    assert total(prefix=6, routed=0, keep=1.0) < total(prefix=2, routed=4, keep=1.0), "routing is never free"


def test_kept_tokens_are_rounded_up():
    plan = uniform(official(16), prefix=4, routed=0, keep=0.51)
    assert costs.block_macs(official(16), plan, 0, 9)["ffn"] == math.ceil(0.51 * 256) * 8 * 1024 * 1024


def test_several_plans_in_one_report():
    plans = {"fast": uniform(TINY, keep=0.25), "fine": uniform(TINY, keep=1.0)}
    report = count_flops(TINY, None, plans, "fine")
    assert report.plan == "fine" and list(report.plans) == ["fast"]
    assert report.plans["fast"].reduction.transformer > report.reduction.transformer
    assert report.plans["fast"].sparse == count_flops(TINY, None, plans, "fast").sparse


def test_json_keeps_its_contract():
    plan = uniform(official(16), experts=16)
    report = count_flops(official(16), tokenizer(), {"plan": plan})
    given = json.loads(report.to_json())
    assert given["schema"] == "actvar.flops/1"
    assert given["convention"]["flops_per_mac"] == 2
    assert given["convention"]["guidance"] is True and given["convention"]["batch"] == 1
    assert given["plan"] == "plan"
    assert set(given["reduction"]) == {"transformer", "end_to_end"}
    for side in ("dense", "sparse"):
        assert tuple(given[side]["components"]) == COMPONENTS
        for cost in (*given[side]["components"].values(), given[side]["transformer"], given[side]["end_to_end"]):
            assert cost["flops"] == 2 * cost["macs"]
        assert len(given[side]["per_scale"]) == 10 and len(given[side]["per_block"]) == 16
    assert FlopsReport.model_validate_json(report.to_json()) == report

    dense = json.loads(count_flops(official(16)).to_json())
    assert not {"sparse", "reduction", "plan", "plans"} & set(dense)
    assert "end_to_end" not in dense["dense"] and "vqvae_decoder" not in dense["dense"]["components"]


def test_plans_that_do_not_fit_are_named_together():
    short = SparsityPlan(experts=4, blocks=uniform(TINY).blocks[:1], reconstruction_rank=3)
    bad = {"a": uniform(TINY, experts=3), "b": short}
    with pytest.raises(RecipeError) as error:
        count_flops(TINY, None, bad, "a")
    assert len(error.value.problems) == 2
    assert "a: plan.experts" in str(error.value) and "b: plan.blocks" in str(error.value)


def test_unknown_default_plan():
    plans = {"fast": uniform(TINY), "fine": uniform(TINY)}
    with pytest.raises(InputError, match=r"no plan 'slow'.*fast, fine"):
        count_flops(TINY, None, plans, "slow")
    with pytest.raises(InputError, match="name the plan"):
        count_flops(TINY, None, plans)
    with pytest.raises(InputError, match="none"):
        count_flops(TINY, None, None, "slow")
