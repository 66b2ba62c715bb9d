"""What inspection says about files of all kinds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from actvar_convert.errors import InputError
from actvar_convert.files.dense import load_dense
from actvar_convert.files.inspection import inspect_file
from actvar_convert.files.source import model_shape
from actvar_convert.files.sparse_folder import save_sparse
from actvar_convert.models.model import Model

Parts = tuple[dict[str, Tensor], dict[str, Tensor]]
LINE = "VAR: 2 blocks, width 64, FFN hidden 128, 2 heads, 4 scales to 4\N{MULTIPLICATION SIGN}4, 5 classes; "


def test_complete_model(official_pair: tuple[Path, Path], parts: Parts) -> None:
    found = inspect_file(official_pair[0], values=True)
    parameters = sum(t.numel() for n, t in parts[0].items() if n.split(".")[-1] not in ("lvl_1L", "zero_k_bias"))
    parameters -= parts[0]["attn_bias_for_masking"].numel()
    assert (found.kind, found.complete, found.nonfinite, found.dtype) == ("var", True, 0, "fp32")
    assert found.parameters == parameters
    assert found.line == LINE + f"{parameters / 1000:.0f} k parameters, fp32"
    assert found.config is not None and found.config.depth == 2
    assert found.tokenizer is not None and found.tokenizer.ch_mult == (1, 2)
    assert any(str(official_pair[1]) in note for note in found.notes)
    assert json.loads(found.to_json())["schema"] == "actvar.inspect/1"


def test_everything_wrong_is_listed(tmp_path: Path, parts: Parts) -> None:
    tensors = parts[0]
    del tensors["blocks.1.ffn.fc1.bias"]
    tensors["head.weight"] = tensors["head.weight"].T.contiguous()
    tensors["extra"] = torch.zeros(2)
    tensors["head.bias"] = torch.tensor([torch.nan, torch.inf] + [0.0] * 30)
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors", values=True)
    assert found.missing == ("blocks.1.ffn.fc1.bias",)
    assert found.unexpected == ("extra",)
    assert found.mis_shaped == ("head.weight: [64, 32] in the file, [32, 64] needed",)
    assert found.nonfinite == 2 and not found.complete
    assert inspect_file(tmp_path / "x.safetensors").nonfinite is None


def test_a_file_that_ends_before_its_last_block(tmp_path: Path, official_pair: tuple[Path, Path], parts: Parts) -> None:
    (tmp_path / "config.json").write_text('{"depth": 3}')
    save_file(parts[0], tmp_path / "model.safetensors")
    found = inspect_file(tmp_path)
    assert not found.complete and set(found.missing) >= {"blocks.2.attn.proj.weight", "blocks.2.ffn.fc2.bias"}
    assert all(name.startswith("blocks.2.") for name in found.missing)
    assert "the file ends after 2 blocks; its config.json says 3: the rest is missing" in found.notes
    with pytest.raises(InputError, match=r"blocks\.2\..* is missing"):
        model_shape(tmp_path)
    (tmp_path / "config.json").write_text('{"depth": 2}')
    assert inspect_file(tmp_path).complete and load_dense(tmp_path).transformer.config.depth == 2


def test_without_the_class_embedding_the_rest_is_still_looked_at(tmp_path: Path, parts: Parts) -> None:
    del parts[0]["class_emb.weight"]
    save_file(parts[0], tmp_path / "x.safetensors")
    found = inspect_file(tmp_path / "x.safetensors", values=True)
    assert (found.missing, found.mis_shaped, found.nonfinite) == (("class_emb.weight",), (), 0) and not found.complete
    assert "class_emb.weight is missing, and nothing else tells the classes; 1000 is a guess" in found.notes


def test_tokenizer_alone(official_pair: tuple[Path, Path]) -> None:
    official_pair[0].unlink()
    found = inspect_file(official_pair[1])
    assert found.kind == "vqvae" and found.complete and found.config is None
    assert found.line.startswith("VQVAE: 32 channels, multipliers 1,2, 1 residual block per resolution, 2")


def test_a_disagreement_keeps_the_model_from_being_loaded(official_pair: tuple[Path, Path], parts: Parts) -> None:
    tokenizer = {**parts[1], "quantize.ema_vocab_hit_SV": torch.zeros(6, 32)}
    torch.save(tokenizer, official_pair[1])
    found = inspect_file(*official_pair)
    assert found.disagreements == ("scales: transformer 4, tokenizer 6",) and not found.complete


def test_sparse_folder(tmp_path: Path, sparse: Model) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={"name": "tiny"}, recipe_text="name: x\n")
    found = inspect_file(folder, values=True)
    assert found.kind == "sparse" and found.complete
    assert found.line.startswith("Sparse " + LINE)
    assert found.default_plan == "default" and found.plans["all"] == 1.0
    # of 30 tokens 5 run everything, 9 half of the experts, 8 (of the last 16) half of them, 8 nothing
    assert found.plans["default"] == pytest.approx((5 + 9 / 2 + 8 / 2) / 30)
    assert found.provenance["name"] == "tiny" and found.provenance["recipe_sha256"]
    (folder / "vae.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is an empty file"):
        inspect_file(folder)


@pytest.mark.parametrize(
    ("content", "guess"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b'{"error": "Repository not found"}', "a JSON text"),
        (b"some words\nand more\n", "a text file"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"\x1f\x8b\x08\x00", "a gzip archive"),
        (bytes(range(256)) * 8, "no known kind"),
        ("Gewichte für später".encode() * 400, "a text file"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, guess: str) -> None:
    (tmp_path / "thing.pth").write_bytes(content)
    found = inspect_file(tmp_path / "thing.pth")
    assert found.kind == "other" and not found.complete
    assert found.guess is not None and guess in found.guess
    assert guess in found.line


@pytest.mark.parametrize(
    ("names", "guess"),
    [
        (["down_blocks.0.resnets.0.conv1.weight", "up_blocks.1.x"], "diffusers U-Net"),
        (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "an LLM"),
        (["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"], "an LLM"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion"),
        (["transformer_blocks.0.attn.to_q.weight"], "DiT"),
        (["layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
        (["unet.mid.lora_A.weight"], "a LoRA adapter"),
        (["blocks.0.ffn.permutation"], "actvar-sparse folder"),
        (["a", "b", "c", "d"], "4 tensors have unknown names (a, b, c"),
    ],
)
def test_other_models_are_recognised(tmp_path: Path, names: list[str], guess: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "m.safetensors")
    found = inspect_file(tmp_path / "m.safetensors")
    assert found.kind == "other" and found.guess is not None and guess in found.guess


def test_a_large_file_is_inspected_without_reading_it(tmp_path: Path, parts: Parts) -> None:
    tensors = dict(parts[0])
    tensors["class_emb.weight"] = torch.zeros(1, 1).expand(300_001, 64)
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "large.pth")
    assert (tmp_path / "large.pth").stat().st_size > 70e6
    begin = time.perf_counter()
    found = inspect_file(tmp_path / "large.pth")
    assert time.perf_counter() - begin < 5
    assert found.config is not None and found.config.classes == 300_000
