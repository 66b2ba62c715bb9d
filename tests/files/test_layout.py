"""Configurations read from names and shapes, at the sizes of the published models, without any weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files.inspection import count_text, describe, describe_tokenizer
from actvar_convert.files.layout import (
    Told,
    infer_tokenizer,
    infer_transformer,
    missing_blocks,
    official_config,
    official_names,
    told_of_tokenizer,
)
from actvar_convert.files.skeleton import compare, empty_backbone, empty_tokenizer
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.recipe.shape import Shape

LINES = {
    "var-d16": "VAR-d16: 16 blocks, width 1024, 16 heads, 10 scales to 16x16, 1000 classes; 310 M parameters, fp32",
    "var-d20": "VAR-d20: 20 blocks, width 1280, 20 heads, 10 scales to 16x16, 1000 classes; 601 M parameters, fp32",
    "var-d24": "VAR-d24: 24 blocks, width 1536, 24 heads, 10 scales to 16x16, 1000 classes; 1.0 B parameters, fp32",
    "var-d30": "VAR-d30: 30 blocks, width 1920, 30 heads, 10 scales to 16x16, 1000 classes; 2.0 B parameters, fp32",
    "var-d36": "VAR-d36: 36 blocks, width 2304, 36 heads, 10 scales to 32x32, 1000 classes, shared AdaLN; "
    "2.4 B parameters, fp32",
}


@pytest.mark.parametrize("name", official_names())
def test_published_shapes_are_inferred(name: str) -> None:
    transformer_config, tokenizer_config = official_config(name)
    transformer, tokenizer = empty_backbone(transformer_config), empty_tokenizer(tokenizer_config)
    assert all(parameter.is_meta for parameter in transformer.blocks[0].ffn.parameters())
    assert infer_transformer(transformer.state_dict(), Shape()) == transformer_config
    shape = infer_tokenizer(tokenizer.state_dict())
    assert shape.config(transformer_config.sides, Told()) == tokenizer_config
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    line = describe(transformer_config, parameters, torch.float32)
    assert line.replace("\N{MULTIPLICATION SIGN}", "x") == LINES[name]
    if name == "var-d16":
        assert parameters == 310_283_520
        assert describe_tokenizer(shape, 108_948_355, torch.float16).replace("\N{MULTIPLICATION SIGN}", "x") == (
            "VQVAE: 160 channels, multipliers 1,1,2,2,4, 2 residual blocks per resolution, 16x down, "
            "codebook of 4096 by 32, 10 scales; 109 M parameters, fp16"
        )


def test_names_and_shapes_of_d16_are_the_reference_ones() -> None:
    transformer = empty_backbone(official_config("var-d16")[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert shapes["pos_1LC"] == (1, 680, 1024)
    assert shapes["class_emb.weight"] == (1001, 1024)
    assert shapes["blocks.15.attn.mat_qkv.weight"] == (3072, 1024)
    assert shapes["blocks.15.attn.scale_mul_1H11"] == (1, 16, 1, 1)
    assert shapes["blocks.0.ffn.fc1.weight"] == (4096, 1024)
    assert shapes["blocks.0.ada_lin.1.weight"] == (6144, 1024)
    assert shapes["head.weight"] == (4096, 1024)
    assert len([name for name in shapes if name.startswith("blocks.")]) == 16 * 13
    shared = empty_backbone(official_config("var-d36")[0])
    names = set(shared.state_dict())
    assert {"shared_ada_lin.1.weight", "blocks.35.ada_gss"} <= names and "blocks.0.ada_lin.1.weight" not in names


def test_official_table() -> None:
    transformer, tokenizer = official_config("var-d36")
    assert (transformer.schedule.total, tokenizer.image_size, tokenizer.downsampling) == (2240, 512, 16)
    assert official_config("var-d16")[1].image_size == 256
    with pytest.raises(InputError, match="var-d30"):
        official_config("var-d17")


def _state(**changes: object) -> dict[str, Tensor]:
    config = TransformerConfig(
        depth=3, width=64, heads=2, hidden=96, sides=(1, 2, 4), vocab=16, z_channels=8, classes=3
    )
    return dict(VARTransformer(config.model_copy(update=changes)).state_dict())


def test_one_wrong_shape_does_not_change_the_reading_of_the_rest() -> None:
    state = _state()
    right = infer_transformer(state, Shape())
    for name in ("word_embed.weight", "head.weight", "blocks.1.ffn.fc1.weight", "blocks.0.attn.proj.weight"):
        swapped = {**state, name: state[name].new_zeros(state[name].shape[::-1])}
        read = infer_transformer(swapped, Shape())
        assert read == right
        expected = [] if name == "blocks.0.attn.proj.weight" else [name]
        assert [line.split(":")[0] for line in compare(VARTransformer(read), swapped).mis_shaped] == expected


def test_pyramid_comes_from_levels_then_from_the_caller() -> None:
    state = _state()
    assert infer_transformer(state, Shape()).sides == (1, 2, 4)
    levels = state.pop("lvl_1L")
    with pytest.raises(CheckpointError, match="sides=1-2-3"):
        infer_transformer(state, Shape())
    assert infer_transformer(state, Shape(sides=(1, 2, 4))).sides == (1, 2, 4)
    for name in ("patch_nums", "sides"):
        assert infer_transformer(state, Shape(), {name: [1, 2, 4]}).sides == (1, 2, 4)
    with pytest.raises(CheckpointError, match=r"given as 1,2,5 \(3 scales, 30 tokens\).*3 scales and 21 tokens"):
        infer_transformer(state, Shape(sides=(1, 2, 5)))
    with pytest.raises(CheckpointError, match="square token maps"):
        infer_transformer({**state, "lvl_1L": levels.flip(1)}, Shape())


def test_heads_come_from_the_scale_then_from_the_caller_then_from_the_width() -> None:
    state = _state()
    assert infer_transformer(state, Shape()).heads == 2
    with pytest.raises(CheckpointError, match="heads was given as 4, the file has 2"):
        infer_transformer(state, Shape(heads=4))
    plain = _state(l2_attention=False)
    assert infer_transformer(plain, Shape()).heads == 1
    assert infer_transformer(plain, Shape(heads=8)).heads == 8
    for hints in ({"num_heads": 4}, {"heads": 4}, {"heads": 4, "num_heads": 2}):
        assert infer_transformer(plain, Shape(), hints).heads == 4
    with pytest.raises(CheckpointError, match="heads 5 does not divide"):
        infer_transformer(plain, Shape(heads=5))
    narrow = _state(l2_attention=False, width=96)
    with pytest.raises(CheckpointError, match="--shape heads=N"):
        infer_transformer(narrow, Shape())


@pytest.mark.parametrize(
    ("depth", "hints", "expected"),
    [
        (16, {}, None),
        (15, {}, 16),
        (2, {}, 16),
        (17, {}, None),
        (15, {"depth": 15}, None),
        (15, {"depth": 20}, 20),
        (15, {"depth": 10**9}, 16),
    ],
)
def test_depth_of_a_published_shape_or_of_the_config(
    depth: int, hints: dict[str, object], expected: int | None
) -> None:
    config = official_config("var-d16")[0].model_copy(update={"depth": depth})
    found = missing_blocks(config, hints)
    assert (None if found is None else found[0]) == expected


@pytest.mark.parametrize("hints", [{"num_heads": "2"}, {"num_heads": [1]}, {"patch_nums": 5}, {"patch_nums": "124"}])
def test_hints_of_the_wrong_kind_are_named(hints: dict[str, object]) -> None:
    plain = _state(l2_attention=False)
    del plain["lvl_1L"]
    with pytest.raises(CheckpointError, match=rf"config\.json gives .* as {next(iter(hints))}"):
        infer_transformer(plain, Shape(sides=None if "patch_nums" in hints else (1, 2, 4)), hints)


@pytest.mark.parametrize("depth", ["8", 8.0, True, [8]])
def test_a_depth_of_the_wrong_kind_is_named(depth: object) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json gives .* as depth; a whole number was expected"):
        missing_blocks(official_config("var-d16")[0], {"depth": depth})


@pytest.mark.parametrize(
    "hints",
    [
        {"residual_ratio": "0.3"},
        {"residual_ratio": True},
        {"vae_kwargs": {"quant_resi": "0.5"}},
        {"using_znorm": 1},
        {"vae_kwargs": {"using_znorm": "yes"}},
    ],
)
def test_what_no_tensor_tells_has_to_be_of_its_kind(hints: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json gives .* was expected\. Correct it"):
        told_of_tokenizer(Shape(), hints)
    assert told_of_tokenizer(Shape(residual_ratio=0.25, using_znorm=False), hints) == (0.25, False)


def test_the_configuration_beside_a_file_tells_what_no_tensor_does() -> None:
    told = told_of_tokenizer(Shape(), {"vae_kwargs": {"quant_resi": -0.5, "using_znorm": True}})
    assert told == (0.5, True)
    assert told_of_tokenizer(Shape(), {"residual_ratio": 0.25, "vae_kwargs": {"quant_resi": 0.5}}) == (0.25, None)


def test_claims_beyond_reason_are_refused() -> None:
    state = _state()
    huge = {**state, "pos_1LC": torch.empty(1, 10**9, 64, device="meta")}
    del huge["lvl_1L"]
    with pytest.raises(CheckpointError, match="1,000,000,000 tokens"):
        infer_transformer(huge, Shape())
    with pytest.raises(CheckpointError, match="most are missing"):
        infer_transformer({**state, "blocks.999999999999999.ffn.fc1.bias": torch.zeros(1)}, Shape())


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (12, "12"),
        (1500, "1.5 k"),
        (6_832_000, "6.8 M"),
        (310_283_520, "310 M"),
        (999_900_000, "1.0 B"),
        (2_300_000_000, "2.3 B"),
    ],
)
def test_counts_in_words(number: int, text: str) -> None:
    assert count_text(number) == text
