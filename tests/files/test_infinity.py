"""Infinity files: names, training checkpoints, shards, either nesting; what is warned of and refused; export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import actvar_convert as av
from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files import infinity
from actvar_convert.files.published import official_config, official_names
from actvar_convert.models.model import Model
from tests.infinity_model import GOLDEN, golden_model, golden_weights, prompts, square_model

MANIFEST = json.loads(GOLDEN.with_suffix(".json").read_text())
MAPS = [tuple(each) for each in MANIFEST["config"]["square"]]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return golden_weights(MANIFEST, "gpt")


@pytest.fixture(scope="module")
def vae_weights() -> dict[str, Tensor]:
    return golden_weights(MANIFEST, "vae")


@pytest.fixture(scope="module")
def expected() -> Tensor:
    model = golden_model(MANIFEST)
    return model.generate_tokens(prompts(model, 3, 7), seed=1, cfg=3, tau=1.0, top_k=0, top_p=0.0)


def works(model: Model, expected: Tensor) -> None:
    bits = model.generate_tokens(prompts(model, 3, 7), seed=1, cfg=3, tau=1.0, top_k=0, top_p=0.0, schedule=MAPS)
    assert torch.equal(bits, expected)


def _plain(gpt: dict[str, Tensor], vae: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    torch.save(gpt, folder / "infinity_tiny.pth")
    torch.save({"vae": vae, "image_disc": {"conv.weight": torch.zeros(3)}}, folder / "infinity_vae_d8.pth")
    return folder / "infinity_tiny.pth", folder / "infinity_vae_d8.pth"


def _training(gpt: dict[str, Tensor], vae: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    ema = {name: tensor * 0 for name, tensor in gpt.items()}
    nested = {"trainer": {"gpt_fsdp": {f"_fsdp_wrapped_module.{n}": t for n, t in gpt.items()}, "gpt_ema_fsdp": ema}}
    nested["epoch"] = 3  # type: ignore[assignment]
    torch.save(nested, folder / "ar-ckpt.pth")
    torch.save({"vae": vae, "ema": {n: t * 0 for n, t in vae.items()}}, folder / "vae.pth")
    return folder / "ar-ckpt.pth", folder / "vae.pth"


def _shards(gpt: dict[str, Tensor], vae: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    names = sorted(gpt)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: gpt[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "infinity"}')
    save_file(vae, folder / "tokenizer.safetensors")
    return folder, folder / "tokenizer.safetensors"


def _otherwise_named(gpt: dict[str, Tensor], vae: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    """Blocks that stand alone, scales of a special attention, convolutions and norms nested once less, in one file."""
    own = {
        name: tensor.transpose(1, 2).contiguous() if name.endswith("scale_mul_1H11") else tensor
        for name, tensor in infinity.own_names(gpt).items()
    }
    own["blocks.0.sa.zero_k_bias"] = torch.zeros(64)
    both = {f"gpt.{n}": t for n, t in own.items()} | {
        f"vae.{n}": t for n, t in infinity.own_tokenizer_names(vae).items()
    }
    save_file(both, folder / "both.safetensors")
    return folder / "both.safetensors", folder / "both.safetensors"


@pytest.mark.parametrize("write", [_plain, _training, _shards, _otherwise_named])
def test_it_loads(
    write: Callable[..., tuple[Path, Path]],
    weights: dict[str, Tensor],
    vae_weights: dict[str, Tensor],
    expected: Tensor,
    tmp_path: Path,
) -> None:
    source, vae = write(weights, vae_weights, tmp_path)
    model = av.load(source, vae=vae, device="cpu")
    works(model, expected)
    assert model.family.name == "infinity" and model.schedule.total == 10521
    found = av.inspect(source, vae=vae)
    assert found.complete and found.kind == "infinity" and found.config == model.config
    assert "4 blocks, width 64, 2 heads, 8 bits a token" in found.line


def test_maps_are_given_or_follow_from_the_name(
    weights: dict[str, Tensor], vae_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    _, vae = _plain(weights, vae_weights, tmp_path)
    torch.save(weights, tmp_path / "mine_512x512.pth")
    model = av.load(tmp_path / "mine_512x512.pth", vae=vae, device="cpu")
    assert model.schedule.maps[-1] == (32, 32) and model.tokenizer.config.maps == model.config.maps
    wide = av.load(tmp_path / "mine_512x512.pth", vae=vae, shape={"schedule": "0.06M@0.666"}, device="cpu")
    assert wide.schedule.maps[-1] == (14, 21)
    with pytest.raises(InputError, match="no schedule is called '9M'"):
        av.load(tmp_path / "mine_512x512.pth", vae=vae, shape={"schedule": "9M"})
    with pytest.raises(InputError, match="heads and sides"):
        av.load(tmp_path / "mine_512x512.pth", vae=vae, shape={"heads": 2, "sides": [1, 2]})


def test_what_does_not_fit_is_refused(
    weights: dict[str, Tensor], vae_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    source, vae = _plain(weights, vae_weights, tmp_path)
    square = square_model().tokenizer.state_dict()
    save_file(infinity.reference_tokenizer_names(square), tmp_path / "d4.safetensors")
    broken = {n: t for n, t in weights.items() if n != "block_chunks.1.module.0.ca.mat_q.bias"}
    torch.save(broken, tmp_path / "broken.pth")
    wrong = weights | {"head.weight": torch.zeros(16, 63)}
    torch.save(wrong, tmp_path / "wrong.pth")
    for given, words in (
        ({"source": source, "vae": tmp_path / "d4.safetensors"}, "tokens of 8 bits.*codes of 4 "),
        ({"source": source}, "no tokenizer in it.*infinity_vae_d32reg.pth"),
        ({"source": vae}, "a tokenizer and no transformer"),
        ({"source": source, "vae": source}, "no Infinity tokenizer in it: it is an Infinity transformer"),
        ({"source": tmp_path / "broken.pth", "vae": vae}, r"(?s)as an Infinity.*blocks\.2\.ca\.mat_q\.bias"),
        ({"source": tmp_path / "wrong.pth", "vae": vae}, r"(?s)head.weight: \[16, 63\] in the file, \[16, 64\] needed"),
    ):
        (tmp_path / "infinity_vae_d8.pth").touch()
        with pytest.raises(CheckpointError, match=words):
            av.load(**given)


def test_export_gives_the_source_bit_by_bit(
    weights: dict[str, Tensor], vae_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    source, vae = _plain(weights, vae_weights, tmp_path)
    model = av.load(source, vae=vae, device="cpu")
    av.export(model, out=tmp_path / "out.safetensors", vae_out=tmp_path / "out_vae.safetensors")
    back, vae_back = (load_file(tmp_path / name) for name in ("out.safetensors", "out_vae.safetensors"))
    assert {
        n for n in back if not n.endswith("zero_k_bias")
    } == weights.keys() and vae_back.keys() == vae_weights.keys()
    for out, given in ((back, weights), (vae_back, vae_weights)):
        assert all(torch.equal(out[name], tensor) for name, tensor in given.items())


def test_the_published_models_have_names_and_shapes() -> None:
    names = [name for name in official_names() if name.startswith("infinity")]
    assert names == ["infinity-125m", "infinity-2b", "infinity-8b", "infinity-8b-512"]
    for name, teraflops in (("infinity-2b", (115.42, 9.85)), ("infinity-8b-512", (77.58, 2.47))):
        report = av.report_flops(name)
        found = report.dense.transformer.flops, report.dense.components["vqvae_decoder"].flops
        assert tuple(round(value / 1e12, 2) for value in found) == teraflops
    assert official_config("infinity-125m")[0].schedule.total == 521
    wide = av.report_flops("infinity-2b", shape={"schedule": "0.25M@1.5"})
    assert wide.dense.transformer.flops < report.dense.transformer.flops
    assert "32 bits a token, 13 scales" in av.inspect("infinity-2b").line
    with pytest.raises(InputError, match=r"shape of infinity-2b is known\. Leave heads out"):
        av.report_flops("infinity-2b", shape={"heads": 16})


def test_the_neighbour_of_the_right_tokenizer_is_warned_of() -> None:
    config, _ = official_config("infinity-2b")
    (doubt,) = infinity.doubts(config, Path("infinity_vae_d32.pth"))
    assert "bad pictures" in doubt and "infinity_vae_d32reg.pth" in doubt
    assert not infinity.doubts(config, Path("infinity_vae_d32reg.pth"))


def test_a_file_cut_after_a_chunk_is_incomplete() -> None:
    from actvar_convert.files.skeleton import empty_backbone
    from actvar_convert.recipe.shape import Shape

    config, _ = official_config("infinity-125m")
    named = infinity.reference_names(empty_backbone(config).state_dict(), config)
    whole, _ = infinity.infer_whole(named, Shape(), {}, Path("infinity_125M_256x256.pth"))
    assert whole == config
    cut = {name: tensor for name, tensor in named.items() if not name.startswith("block_chunks.3.")}
    with pytest.raises(CheckpointError, match="ends after 9 blocks; the published model of this width has 12"):
        infinity.infer_whole(cut, Shape(), {}, Path("x.pth"))
    shallow, _ = infinity.infer_whole(cut, Shape(), {"depth": 9}, Path("x.pth"))
    assert shallow.depth == 9 and shallow.chunks == 3


def test_published_sampling() -> None:
    sampling: dict[str, Any] = {
        name: infinity.published_sampling(official_config(name)[0]) for name in infinity.PUBLISHED
    }
    assert sampling["infinity-2b"].tau == 0.5 and sampling["infinity-8b"].tau == 1.0
    assert all((own.cfg, own.top_k, own.top_p) == (4.0, 900, 0.97) for own in sampling.values())


def test_what_was_chosen_is_said(
    weights: dict[str, Tensor], vae_weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, vae = _plain(weights, vae_weights, tmp_path)
    av.load(source, vae=vae, device="cpu")
    assert "images of 1M pixels were taken (as published)" in caplog.text
    caplog.clear()
    av.load(source, vae=vae, shape={"schedule": "0.06M"}, device="cpu")
    assert "pixels" not in caplog.text


def test_a_tokenizer_alone_is_said_to_be_one(
    weights: dict[str, Tensor], vae_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    _, vae = _plain(weights, vae_weights, tmp_path)
    found = av.inspect(vae)
    assert found.kind == "bsq" and found.complete and "codes of 8 bits" in found.line
