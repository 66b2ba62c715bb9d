"""Infinity against outputs of the reference implementation, for weights that a formula makes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import actvar_convert as av
from actvar_convert.models.base import Call
from actvar_convert.models.infinity.network import rotary_table
from actvar_convert.models.model import Model
from actvar_convert.models.schedule import Schedule
from tests.infinity_model import GOLDEN, golden_model

CASES = ("greedy", "published", "listed", "hidden", "unguided", "wide")


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.with_suffix(".json").read_text())
    return content


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def model(manifest: dict[str, Any]) -> Model:
    return golden_model(manifest)


@pytest.fixture(scope="module")
def rows(golden: dict[str, Tensor], manifest: dict[str, Any]) -> av.TextRows:
    return av.TextRows(golden["text.kv_compact"], manifest["config"]["lens"])


def close(ours: Tensor, theirs: Tensor, within: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=within)


def test_the_condition_and_the_source_of_keys(model: Model, golden: dict[str, Tensor], rows: av.TextRows) -> None:
    with torch.inference_mode():
        prepared = model.transformer.prepare(rows)
    close(prepared.condition, golden["text.cond_BD"], 1e-5)
    source = torch.cat([own[:length] for own, length in zip(prepared.text.rows, rows.lengths, strict=True)])
    close(source, golden["text.ca_kv"], 1e-5)


@pytest.mark.parametrize("name", ["square", "wide"])
def test_rotary_tables(model: Model, golden: dict[str, Tensor], manifest: dict[str, Any], name: str) -> None:
    schedule = Schedule.of(manifest["config"][name])
    assert schedule is not None
    close(rotary_table(model.config, schedule).transpose(0, 1), golden[f"rope.cos_sin_{name}"], 1e-5)


def test_the_first_block_and_the_logits_under_teacher_forcing(
    model: Model, golden: dict[str, Tensor], rows: av.TextRows
) -> None:
    inputs, block = golden["tf.x_BLC_wo_prefix"], model.transformer.blocks[0]
    with torch.inference_mode():
        x, prepared, call = model.start(rows, inputs)
        after = block(x, block.context(prepared), Call(call.span, call.table))
        logits = model.transformer(rows, inputs)
    close(after[:1], golden["tf.block0.output"], 5e-5)
    close(logits, golden["tf.logits_BLV"], 1e-4)


def test_features_bits_reconstruction_and_inputs(model: Model, golden: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        features = model.tokenizer.features(golden["vae.image"])
        bits = model.tokenizer.encode(golden["vae.image"], model.schedule)
        image = model.tokenizer.decode(bits, model.schedule)
        inputs = model.teacher_forcing_input(bits)
    close(features, golden["vae.raw_features"], 1e-4)
    assert torch.equal(bits, golden["tf.bits_BLD"].long())
    close(image, golden["vae.reconstruction"], 1e-4)
    close(inputs, golden["tf.x_BLC_wo_prefix"], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_generations(
    model: Model, golden: dict[str, Tensor], manifest: dict[str, Any], rows: av.TextRows, case: str
) -> None:
    said, layer = manifest["generation"][case], manifest["generation"][case]["cfg_insertion_layer"][0]
    arguments: dict[str, Any] = {"seed": said["g_seed"], "cfg": said["cfg_list"], "tau": said["tau_list"]}
    arguments |= {"top_k": said["top_k"], "top_p": said["top_p"], "schedule": said["schedule"]}
    arguments |= {"guidance_layer": layer or None}
    if said["negative_prompt"]:
        negative = golden["text.negative_kv_compact"]
        arguments["negative"] = av.TextRows(negative, manifest["config"]["negative_lens"])
    bits = model.generate_tokens(rows, **arguments)
    assert torch.equal(bits, golden[f"gen.{case}.bits_BLD"].long())
    images = model.generate(rows, **arguments)
    close(images[:1] * 2 - 1, golden[f"gen.{case}.image"], 1e-4)
    if case == "greedy":
        theirs = golden["gen.greedy.picture_uint8_BHWC_as_returned"].flip(-1)
        assert int((images.mul(255).byte().permute(0, 2, 3, 1).int() - theirs.int()).abs().max()) <= 1


def test_teacher_forcing_over_the_sampled_bits_gives_the_logits_they_were_sampled_from(
    model: Model, golden: dict[str, Tensor], rows: av.TextRows
) -> None:
    bits = golden["gen.unguided.bits_BLD"].long()
    with torch.inference_mode():
        logits = model.transformer(rows, model.teacher_forcing_input(bits))
    close(logits[:1, -256:], golden["gen.unguided.logits_scale6"], 2e-5)
