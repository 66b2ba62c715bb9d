"""Dense models in every form that people store them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from actvar_convert.errors import CheckpointError
from actvar_convert.files.dense import load_dense
from actvar_convert.files.tensors import write_weights
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE

Parts = tuple[dict[str, Tensor], dict[str, Tensor]]
Same = Callable[[Model, Model], None]
OPTIONAL = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def _without_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(OPTIONAL)}


def _plain_pair(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, Path | None]:
    torch.save(transformer, folder / "a.pth")
    torch.save(tokenizer, folder / "b.pth")
    return folder / "a.pth", folder / "b.pth"


def _found_beside(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, None]:
    torch.save(transformer, folder / "var_d2.pth")
    torch.save(tokenizer, folder / "vae_ch32.pth")
    return folder / "var_d2.pth", None


def _safetensors(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, Path]:
    save_file(transformer, folder / "var.safetensors")
    save_file(tokenizer, folder / "tok.safetensors")
    return folder / "var.safetensors", folder / "tok.safetensors"


def _training_checkpoint(
    folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]
) -> tuple[Path, None]:
    moments = {0: {"step": 3, "exp_avg": torch.zeros(4)}}
    trainer = {
        "config": {"prog_si": -1},
        "var_wo_ddp": transformer,
        "vae_local": tokenizer,
        "var_opti": {"optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]}},
    }
    torch.save({"args": {"depth": 2}, "epoch": 7, "trainer": trainer}, folder / "ar-ckpt-last.pth")
    return folder / "ar-ckpt-last.pth", None


def _wrapped(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, Path]:
    wrapped = {f"module._orig_mod.{n.replace('blocks.1.', 'blocks.1._orig_mod.')}": t for n, t in transformer.items()}
    torch.save({"state_dict": wrapped}, folder / "ddp.pth")
    torch.save({"model": {f"module.{n}": t for n, t in tokenizer.items()}}, folder / "tok.pth")
    return folder / "ddp.pth", folder / "tok.pth"


def _one_dictionary(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, None]:
    torch.save({**transformer, **{f"vae.{n}": t for n, t in tokenizer.items()}}, folder / "all.pt")
    return folder / "all.pt", None


def _hub_folder(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, Path]:
    hub = folder / "hub"
    hub.mkdir()
    arguments = {"vae_kwargs": {"quant_resi": 0.5, "ch": 32}, "depth": 2, "num_heads": 2, "patch_nums": [1, 2, 3, 4]}
    (hub / "config.json").write_text(json.dumps(arguments))
    save_file(_without_buffers(transformer), hub / "model.safetensors")
    torch.save(tokenizer, folder / "tok.pth")
    return hub, folder / "tok.pth"


def _sharded_folder(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, None]:
    write_weights(folder, "model", transformer, 100_000)
    write_weights(folder, "vae", tokenizer, 100_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder, None


def _averaged_too(folder: Path, transformer: dict[str, Tensor], tokenizer: dict[str, Tensor]) -> tuple[Path, Path]:
    average = {name: torch.zeros_like(tensor) for name, tensor in transformer.items()}
    torch.save({"ema": average, "model": transformer}, folder / "both.pth")
    torch.save(tokenizer, folder / "tok.pth")
    return folder / "both.pth", folder / "tok.pth"


@pytest.mark.parametrize(
    "store",
    [
        _plain_pair,
        _found_beside,
        _safetensors,
        _training_checkpoint,
        _wrapped,
        _one_dictionary,
        _hub_folder,
        _sharded_folder,
        _averaged_too,
    ],
)
def test_every_form_loads_as_the_same_model(
    store: Callable[..., tuple[Path, Path | None]], tmp_path: Path, parts: Parts, dense: Model, same_model: Same
) -> None:
    source, vae = store(tmp_path, *parts)
    same_model(load_dense(source, vae), dense)


def test_the_configuration_beside_a_file_counts_as_in_its_folder(tmp_path: Path, parts: Parts, dense: Model) -> None:
    hub, vae = _hub_folder(tmp_path, *parts)
    plain = {name: t for name, t in _without_buffers(parts[0]).items() if not name.endswith("scale_mul_1H11")}
    save_file(plain, hub / "model.safetensors")
    for source in (hub, hub / "model.safetensors"):
        model = load_dense(source, vae)
        assert (model.config.heads, model.config.sides) == (2, (1, 2, 3, 4))
        assert model.origin["path"] == str(hub / "model.safetensors")
    save_file(plain, hub / "other.safetensors")
    with pytest.raises(CheckpointError, match="sides=1-2-3"):
        load_dense(hub / "other.safetensors", vae)


def test_buffers_may_be_absent(tmp_path: Path, parts: Parts, dense: Model, same_model: Same) -> None:
    source, vae = _plain_pair(tmp_path, *map(_without_buffers, parts))
    same_model(load_dense(source, vae, shape={"sides": (1, 2, 3, 4)}), dense)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path: Path, parts: Parts, stored: torch.dtype) -> None:
    source, vae = _plain_pair(tmp_path, *({n: t.to(stored) for n, t in part.items()} for part in parts))
    model = load_dense(source, vae)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weight = parts[0]["blocks.1.ffn.fc1.weight"]
    assert torch.equal(model.transformer.blocks[1].ffn.fc1.weight, weight.to(stored).float())
    kept = load_dense(source, vae, dtype="keep")
    assert {p.dtype for p in kept.parameters()} == {stored}
    assert torch.equal(kept.transformer.lvl_1L, parts[0]["lvl_1L"])


def test_asked_precision_leaves_the_tokenizer_alone(official_pair: tuple[Path, Path]) -> None:
    model = load_dense(*official_pair, dtype=torch.bfloat16)
    assert model.transformer.blocks[0].attn.zero_k_bias.dtype == model.dtype == torch.bfloat16
    assert model.tokenizer.quant_conv.weight.dtype == torch.float32
    assert model.generate([1, 2]).isfinite().all()


def test_training_the_model_never_touches_the_file(official_pair: tuple[Path, Path]) -> None:
    before = official_pair[0].read_bytes()
    model = load_dense(*official_pair)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(1)
    assert all(parameter.requires_grad for parameter in model.transformer.parameters())
    assert official_pair[0].read_bytes() == before


def test_shared_adaln_and_plain_attention(tmp_path: Path, same_model: Same) -> None:
    config = TransformerConfig(
        depth=3, width=128, heads=4, hidden=192, sides=(1, 3), vocab=16, z_channels=4, classes=2,
        shared_adaln=True, l2_attention=False,
    )  # fmt: skip
    tokenizer = TokenizerConfig(
        ch=32, ch_mult=(1, 1, 3), res_blocks=2, vocab=16, z_channels=4, sides=(1, 3), phis=2, residual_ratio=0.25
    )
    torch.manual_seed(0)
    model = Model(VARTransformer(config), VQVAE(tokenizer)).eval()
    source, vae = _plain_pair(tmp_path, model.transformer.state_dict(), model.tokenizer.state_dict())
    assert load_dense(source, vae).transformer.config.heads == 2  # the rule: width / 64
    same_model(load_dense(source, vae, shape={"heads": 4, "residual_ratio": 0.25}), model)


@pytest.mark.parametrize("stored_as", ["quantize.quant_resi.qresi", "quantize.quant_resi.0"])
def test_phi_convolutions_of_all_kinds(tmp_path: Path, parts: Parts, stored_as: str) -> None:
    transformer, tokenizer = parts
    kernel = {leaf: tokenizer[f"quantize.quant_resi.qresi_ls.0.{leaf}"] for leaf in ("weight", "bias")}
    others = {name: tensor for name, tensor in tokenizer.items() if "qresi" not in name}
    names = [stored_as] if stored_as.endswith("qresi") else [f"quantize.quant_resi.{i}" for i in range(4)]
    phis = {f"{name}.{leaf}": tensor.clone() for name in names for leaf, tensor in kernel.items()}
    model = load_dense(*_plain_pair(tmp_path, transformer, {**others, **phis}))
    assert model.tokenizer.config.phis == len(names)
    assert torch.equal(model.tokenizer.quantize.quant_resi.qresi_ls[-1].weight, kernel["weight"])


def test_origin_is_recorded(official_pair: tuple[Path, Path]) -> None:
    assert load_dense(*official_pair).origin == {"path": str(official_pair[0]), "vae": str(official_pair[1])}


def test_all_problems_are_reported_at_once(tmp_path: Path, parts: Parts) -> None:
    transformer, tokenizer = parts
    transformer["blocks.0.attn.proj.weight"] = torch.full((64, 64), torch.nan)
    transformer["head.bias"] = torch.full((32,), torch.inf)
    del tokenizer["post_quant_conv.bias"]
    tokenizer["decoder.conv_in.bias"] = torch.zeros(63)
    with pytest.raises(CheckpointError) as caught:
        load_dense(*_plain_pair(tmp_path, transformer, tokenizer))
    text = "\n".join(caught.value.problems)
    for expected in (
        "blocks.0.attn.proj.weight has 4,096 NaN",
        "head.bias has 32 NaN",
        "post_quant_conv.bias is missing",
        "decoder.conv_in.bias: [63] in the file, [64] needed",
    ):
        assert expected in text
