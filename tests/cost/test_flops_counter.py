"""The report against ``torch.utils.flop_counter``, for every operation that one sees (on the CPU not attention)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from actvar_convert.cost.flops import count_flops
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.family import decoder_macs
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.plan import BlockPlan, SparsityPlan

CONFIG = TransformerConfig(
    depth=2, width=64, heads=2, hidden=128, sides=(1, 2, 3, 4), vocab=32, z_channels=8, classes=5
)
TOKENIZER = TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=32, z_channels=8, sides=(1, 2, 3, 4))
UNSEEN = ("attention_products",)


def counted(call) -> dict[str, int]:
    """FLOPs by the name of the operation."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    totals: dict[str, int] = {}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        totals[str(operation)] = totals.get(str(operation), 0) + flops
    return totals


def seen_by_generation(model: Model, images: int = 1) -> int:
    """FLOPs of matrix products in the transformer while generating."""
    totals = counted(lambda: model.generate_tokens([0] * images))
    return sum(flops for name, flops in totals.items() if "conv" not in name)


def expected(components) -> int:
    return sum(cost.flops for name, cost in components.items() if name not in (*UNSEEN, "vqvae_decoder"))


@pytest.fixture
def tokenizer() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(TOKENIZER)


@pytest.mark.parametrize("shared", [False, True])
def test_generation_of_the_dense_model(tokenizer, shared):
    config = TransformerConfig(**CONFIG.model_dump() | {"shared_adaln": shared})
    model = Model(VARTransformer(config), tokenizer)
    assert seen_by_generation(model) == expected(count_flops(config, TOKENIZER).dense.components)


def test_teacher_forcing_is_generation_without_guidance(tokenizer):
    transformer = VARTransformer(CONFIG)
    totals = counted(lambda: transformer(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 29, 8)))
    assert sum(totals.values()) == expected(count_flops(CONFIG, guidance=False).dense.components)


@pytest.mark.parametrize("res_blocks", [1, 2])
@pytest.mark.parametrize("ch_mult", [(1,), (1, 2), (1, 1, 2)])
def test_decoder_convolutions(res_blocks, ch_mult):
    config = TokenizerConfig(**TOKENIZER.model_dump() | {"res_blocks": res_blocks, "ch_mult": ch_mult})
    vae = VQVAE(config)
    pyramid = [torch.zeros(1, n, dtype=torch.int64) for n in config.schedule.lengths]
    totals = counted(lambda: vae.decode(pyramid))
    parts = decoder_macs(config)
    assert sum(f for name, f in totals.items() if "conv" in name) == 2 * (parts.convolutions + parts.phi)


@pytest.mark.parametrize("rank", [0, 4])
def test_generation_of_the_sparse_model(tokenizer, rank):
    first = BlockPlan(prefix=(8, 8, 3, 2), routed=(0, 0, 0, 3), keep=(1.0, 1.0, 1.0, 1.0))
    second = BlockPlan(prefix=(8, 8, 1, 2), routed=(0, 0, 2, 3), keep=(1.0, 1.0, 0.5, 0.6))
    plan = SparsityPlan(
        experts=8,
        blocks=(first, second),
        reconstruction_rank=rank,
    )
    model = fresh_sparse(CONFIG, tokenizer, {"plan": plan}, "plan")
    report = count_flops(CONFIG, TOKENIZER, {"plan": plan})
    assert seen_by_generation(model) == expected(report.sparse.components)
    assert expected(report.sparse.components) < expected(report.dense.components)
