"""The stages of training: an interrupted one ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stages import _restart_unused, attend_by_scale, fit_var, fit_vqvae, grow, var_loss
from torch import Tensor
from training import Log, epoch_index, load_split

from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE

from .conftest import IMAGES, assert_equal_checkpoints

SIDES = (1, 2, 4)
TOKENIZER = TokenizerConfig(ch=32, ch_mult=(1, 1), res_blocks=1, vocab=16, z_channels=4, sides=SIDES)
TRANSFORMER = TransformerConfig(depth=2, width=32, heads=1, hidden=32, sides=SIDES, vocab=16, z_channels=4, classes=3)
CPU = torch.device("cpu")


def until(stop: int | None, batch: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same batches, interrupted at a step."""

    def interrupted(step: int) -> Tensor:
        if step == stop:
            raise KeyboardInterrupt
        return batch(step)

    return interrupted


def images(step: int) -> Tensor:
    return torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(step)).byte()


def tokens(step: int) -> Tensor:
    return torch.randint(16, (5, 21), generator=torch.Generator().manual_seed(step))


def vqvae(folder: Path, stop: int | None = None) -> Path:
    torch.manual_seed(0)
    vae, path = VQVAE(TOKENIZER), folder / "vqvae.pt"
    log = Log(folder / "vqvae.jsonl")
    batches = until(stop, images)
    fit_vqvae(vae, path, log, images=batches, held_out=images(99), steps=5, every=2, device=CPU)
    return path


def var(folder: Path, stop: int | None = None) -> Path:
    torch.manual_seed(0)
    vae, path = VQVAE(TOKENIZER).eval().requires_grad_(False), folder / "var.pt"
    labels, batches = torch.tensor([0, 1, 2, 0, 1]), until(stop, tokens)
    fit_var(
        TRANSFORMER,
        vae,
        path,
        Log(folder / "var.jsonl"),
        pyramids=lambda step: (batches(step), labels),
        held_out=(tokens(99), labels),
        steps=6,
        grow_at=2,
        compiled=False,
        device=CPU,
        every=2,
        coarse_until=3,
        coarse_scales=2,
    )
    return path


@pytest.mark.parametrize(("stage", "stops"), [(vqvae, (1, 3)), (var, (1, 3, 4))])
def test_an_interrupted_stage_ends_the_same(
    tmp_path: Path, stage: Callable[[Path, int | None], Path], stops: tuple[int, ...]
) -> None:
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = stage(tmp_path / "whole", None)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "resumed", stop)
    resumed = stage(tmp_path / "resumed", None)
    assert_equal_checkpoints(whole, resumed)
    written = resumed.read_bytes()
    stage(tmp_path / "resumed", None)
    assert resumed.read_bytes() == written, "a finished stage is left alone"


def test_growing_doubles_the_depth_and_halves_the_gates() -> None:
    model = VARTransformer(TRANSFORMER)
    model.initialise(torch.Generator().manual_seed(0))
    state = model.state_dict()
    grown = grow(state)
    VARTransformer(TRANSFORMER.model_copy(update={"depth": 4})).load_state_dict(grown)
    name = "blocks.{}.ada_lin.1.weight"
    for block in range(4):
        before, after = state[name.format(block // 2)], grown[name.format(block)]
        assert torch.equal(after[:64], before[:64] * 0.5) and torch.equal(after[64:], before[64:])
        assert torch.equal(grown[f"blocks.{block}.ffn.fc1.weight"], state[f"blocks.{block // 2}.ffn.fc1.weight"])


@pytest.mark.parametrize(("sides", "tokens"), [((1, 2, 3, 5), 39), ((1, 2, 3, 5), 14), ((3, 4), 25), ((1,), 1)])
def test_attention_by_scale_is_masked_attention(sides: tuple[int, ...], tokens: int) -> None:
    torch.manual_seed(0)
    shape = TRANSFORMER.model_dump() | {"sides": sides, "heads": 2, "width": 128}  # a copy may keep another's pyramid
    model = VARTransformer(TransformerConfig.model_validate(shape))
    attention, mask = model.blocks[0].attn, model.attn_bias_for_masking[0, 0, :tokens, :tokens] == 0
    inputs = [torch.randn(2, 2, tokens, 64, requires_grad=True) for _ in range(3)]
    whole = attention.attend(inputs[0], inputs[1], inputs[2], mask)
    parts = attend_by_scale(attention, model.config.schedule.lengths, inputs[0], inputs[1], inputs[2], mask)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=3e-5)
    weight = torch.randn_like(whole)
    for part, reference in zip(
        torch.autograd.grad(parts, inputs, weight), torch.autograd.grad(whole, inputs, weight), strict=True
    ):
        torch.testing.assert_close(part, reference, rtol=1e-4, atol=3e-5)


def test_only_unused_codes_restart() -> None:
    torch.manual_seed(0)
    vae, hits = VQVAE(TOKENIZER), torch.ones(16)
    hits[3] = 0
    before = vae.quantize.embedding.weight.detach().clone()
    f = torch.randn(2, 4, 4, 4)
    _restart_unused(vae, f, hits, seed=1)
    after = vae.quantize.embedding.weight.detach()
    assert (after != before).any(1).nonzero().flatten().tolist() == [3]
    rows = f.permute(0, 2, 3, 1).reshape(-1, 4)
    assert float(torch.cosine_similarity(rows, after[3:4]).max()) == pytest.approx(1, abs=1e-5)
    _restart_unused(vae, f, hits, seed=1)
    assert torch.equal(vae.quantize.embedding.weight, after)


def test_an_epoch_is_a_permutation() -> None:
    epochs = [torch.cat([epoch_index(3 * epoch + i, 12, 4, seed=5) for i in range(3)]) for epoch in range(2)]
    assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(12))] * 2
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat([epoch_index(i, 12, 4, seed=6) for i in range(3)]))


def test_images_are_padded_with_black(data: Path) -> None:
    pictures, labels = load_split(data, "train")
    assert pictures.shape == (IMAGES["train"], 1, 32, 32) and labels.tolist() == [i % 10 for i in range(160)]
    assert not pictures[:, :, :2].any() and not pictures[:, :, :, -2:].any()
    assert pictures[9, :, 2:-2, 2:-2].min() >= 180


def test_the_first_scales_have_the_losses_that_they_have_among_all() -> None:
    torch.manual_seed(0)
    model, vae = VARTransformer(TRANSFORMER), VQVAE(TOKENIZER).eval()
    model.initialise(torch.Generator().manual_seed(0))
    x, labels = tokens(0), torch.tensor([0, 1, 2, 0, 1])
    whole = var_loss(model, vae, x, labels)
    begin = 0
    for scale, length in enumerate(TRANSFORMER.schedule.lengths):
        begin += length
        if scale:
            torch.testing.assert_close(var_loss(model, vae, x[:, :begin], labels), whole[:begin])
