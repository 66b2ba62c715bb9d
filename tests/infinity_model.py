"""Small Infinity models: the one of the golden values, with the reference's names, and one with square tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actvar_convert.files.infinity import own_names, own_tokenizer_names
from actvar_convert.models.base import Sampling
from actvar_convert.models.infinity.config import BSQConfig, InfinityConfig
from actvar_convert.models.infinity.network import InfinityTransformer
from actvar_convert.models.infinity.text import TextRows
from actvar_convert.models.infinity.tokenizer import BSQTokenizer
from actvar_convert.models.model import Model

GOLDEN = Path(__file__).parent / "golden" / "infinity"


def golden_weights(manifest: dict[str, Any], part: str) -> dict[str, Tensor]:
    """Weights of ``gpt`` or ``vae`` under the reference's names: normal numbers, rounded to half precision."""
    weights = {}
    for item in manifest[part]:
        values = np.random.RandomState(item["seed"]).standard_normal(math.prod(item["shape"]))
        array = (values * item["std"] + item["mean"]).astype(np.float32).astype(np.float16).reshape(item["shape"])
        weights[item["name"]] = torch.from_numpy(array).float()
    return weights


def golden_model(manifest: dict[str, Any] | None = None) -> Model:
    """The model of the golden values, in memory."""
    manifest = manifest or json.loads(GOLDEN.with_suffix(".json").read_text())
    config = golden_config(manifest)
    transformer, tokenizer = InfinityTransformer(config), BSQTokenizer(golden_tokenizer_config(manifest))
    missing, unexpected = transformer.load_state_dict(own_names(golden_weights(manifest, "gpt")), strict=False)
    assert not unexpected and all(name.endswith("zero_k_bias") for name in missing)
    tokenizer.load_state_dict(own_tokenizer_names(golden_weights(manifest, "vae")))
    return Model(transformer, tokenizer).eval().requires_grad_(False)


def golden_config(manifest: dict[str, Any]) -> InfinityConfig:
    """Shape of the golden transformer."""
    shape = manifest["config"]
    own = shape["transformer"]
    return InfinityConfig(
        depth=own["depth"],
        width=own["embed_dim"],
        heads=own["num_heads"],
        hidden=shape["hidden"],
        bits=shape["d_vae"],
        text_width=own["text_channels"],
        text_length=own["text_maxlen"],
        pool_heads=own["text_channels"] // 128,
        maps=tuple(map(tuple, shape["square"])),
        chunks=own["block_chunks"],
    )


def golden_tokenizer_config(manifest: dict[str, Any]) -> BSQConfig:
    """Shape of the golden tokenizer."""
    own, maps = manifest["config"]["vae"], tuple(map(tuple, manifest["config"]["square"]))
    return BSQConfig(
        ch=own["base_ch"],
        ch_mult=tuple(own["ch_mult"]),
        res_blocks=own["num_res_blocks"],
        z_channels=own["codebook_dim"],
        maps=maps,
    )


def square_model() -> Model:
    """A model whose tokens are squares of four codes, as the 8B's, with random weights; maps to 8 x 8."""
    torch.manual_seed(0)
    maps = ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8))
    shape = {"depth": 2, "width": 64, "heads": 2, "hidden": 256, "bits": 16, "chunks": 2}
    config = InfinityConfig(**shape, text_width=48, text_length=8, pool_heads=4, maps=maps)
    tokenizer = BSQConfig(ch=32, ch_mult=(1, 1), res_blocks=1, z_channels=4, patch=2, maps=maps)
    model = Model(InfinityTransformer(config), BSQTokenizer(tokenizer), Sampling(cfg=3.0, tau=0.8))
    for parameter in model.transformer.parameters():
        parameter.data.mul_(2)  # so that what is left out can be told
    return model.eval().requires_grad_(False)


def prompts(model: Model, *lengths: int) -> TextRows:
    """Random rows of prompts of such lengths."""
    generator = torch.Generator().manual_seed(len(lengths))
    return TextRows(torch.randn(sum(lengths), model.config.text_width, generator=generator), lengths)
