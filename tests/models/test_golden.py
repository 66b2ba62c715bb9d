"""The networks against outputs of the reference implementation, for weights that a formula makes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE

GOLDEN = Path(__file__).parent.parent / "golden" / "var_tiny_adaln"


def _fill(module: nn.Module, specification: list[dict[str, Any]]) -> None:
    """Sets every listed weight to standard normal numbers of its seed, times std, plus mean."""
    weights = {}
    for item in specification:
        values = np.random.RandomState(item["seed"]).standard_normal(math.prod(item["shape"]))
        array = (values * item["std"] + item["mean"]).astype(np.float32).reshape(item["shape"])
        weights[item["name"]] = torch.from_numpy(array)
    result = module.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    buffers = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
    assert all(name.endswith(buffers) for name in result.missing_keys)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.with_suffix(".json").read_text())
    return content


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def model(manifest: dict[str, Any]) -> Model:
    shape = manifest["config"]
    common = {
        "vocab": shape["vocab_size"],
        "z_channels": shape["z_channels"],
        "sides": tuple(shape["patch_nums"]),
    }
    transformer = VARTransformer(
        TransformerConfig(
            depth=shape["depth"],
            width=shape["embed_dim"],
            heads=shape["num_heads"],
            hidden=int(shape["embed_dim"] * shape["mlp_ratio"]),
            classes=shape["num_classes"],
            shared_adaln=shape["shared_aln"],
            l2_attention=shape["attn_l2_norm"],
            norm_eps=shape["norm_eps"],
            **common,
        )
    )
    tokenizer = VQVAE(
        TokenizerConfig(
            ch=shape["vae_ch"], ch_mult=tuple(shape["vae_ch_mult"]), res_blocks=shape["vae_num_res_blocks"], **common
        )
    )
    _fill(transformer, manifest["var"])
    _fill(tokenizer, manifest["vae"])
    return Model(transformer, tokenizer).eval()


def test_state_dict_names_and_shapes_are_those_of_the_reference(model: Model, manifest: dict[str, Any]) -> None:
    for module, key in ((model.transformer, "var_other"), (model.tokenizer, "vae_other")):
        ours = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        assert ours == manifest[key]


def test_teacher_forcing_logits(model: Model, golden: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        logits = model.transformer(golden["tf.labels"], golden["tf.x_BLCv_wo_first_l"])
    torch.testing.assert_close(logits, golden["tf.logits_BLV"], rtol=0, atol=1e-4)


def test_tokens_reconstruction_and_transformer_input(model: Model, golden: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        tokens = model.tokenizer.encode(golden["vae.img_B3HW"])
        image = model.tokenizer.decode(tokens)
        inputs = model.teacher_forcing_input(torch.cat(tokens, dim=1))
    for scale, index in enumerate(tokens):
        assert torch.equal(index, golden[f"vae.idx_scale{scale}"])
    torch.testing.assert_close(image, golden["vae.rec_B3HW"], rtol=0, atol=1e-4)
    torch.testing.assert_close(inputs, golden["vae.var_input"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "plain"])
def test_generation(model: Model, golden: dict[str, Tensor], manifest: dict[str, Any], kind: str) -> None:
    arguments = dict(manifest["gen"][kind])
    arguments = {"seed": arguments.pop("g_seed"), "sampling": model.sampling_with(**arguments)}
    labels = golden["tf.labels"]
    tokens = model.generate_tokens(labels, chunk=3, **arguments)
    assert torch.equal(tokens, golden[f"gen.{kind}.idx_BL"])
    images = model.generate(labels, chunk=3, **arguments)
    torch.testing.assert_close(images, golden[f"gen.{kind}.img_B3HW"], rtol=0, atol=1e-3)
