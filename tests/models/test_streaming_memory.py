"""The memory that large batches stream through, at the shapes of ``fashion`` and d16, on tensors without values.

Sizes, and when tensors come and go, are those of a real run; nothing is computed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from actvar_convert.conversion.budget import uniform_plan
from actvar_convert.files.layout import official_config
from actvar_convert.files.source import model_shape
from actvar_convert.kernels import expert_ffn
from actvar_convert.models.model import GENERATION_BYTES, Model, fresh_sparse, images_at_once
from actvar_convert.models.sampling import Noise
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.labels import Labels
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.recipe.load import load_recipe

GRANTED = GENERATION_BYTES["cpu"]
D16_PLAN = ("budget.reduction=0.4", "budget.gate_keep=0.6", "budget.gate_scales=2")


def shapes(name: str) -> tuple[TransformerConfig, TokenizerConfig]:
    if name != "fashion":
        return official_config(f"var-{name}")
    shape = model_shape("fashion")
    assert shape.tokenizer is not None
    return shape.transformer, shape.tokenizer


def without_weights(name: str, kind: str) -> Model:
    """A dense, a sparse, or a sparse model with folded guidance."""
    config, tokenizer_config = shapes(name)
    with torch.device("meta"):
        tokenizer = VQVAE(tokenizer_config)
        if kind == "dense":
            return Model(VARTransformer(config), tokenizer).eval()
        guidance = {"sparse": "paired", "folded": "folded"}[kind]
        settings = (f"budget.guidance={guidance}", *(D16_PLAN if name == "d16" else ()))
        plan = uniform_plan(config, load_recipe("fashion" if name == "fashion" else f"var_{name}", settings))
        return fresh_sparse(config, tokenizer, {"plan": plan}, "plan").eval()


def without_values(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module weights on the CPU; under FakeTensorMode they have a size and no values."""
    for each in module.modules():
        for table in (each._parameters, each._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    of = dtype if tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=of, device="cpu")
                    table[name] = nn.Parameter(empty, requires_grad=False) if table is each._parameters else empty


def drawn(noise: Noise, scale: int, length: int, outcomes: tuple[int, ...]) -> torch.Tensor:
    """The random numbers of a scale, which no generator makes here."""
    if scale == len(noise._kept) or not noise._keep:
        made = torch.empty(noise._images, length, *outcomes)
        if not noise._keep:
            return made
        noise._kept.append(made)
    return noise._kept[scale]


class Enough(Exception):
    """Raised after two pieces: all further ones take what the second took."""


def peak_of(model: Model, dtype: torch.dtype, images: int, watch: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that ``generate`` of so many images in one chunk takes at most on a CPU, weights not counted."""
    monkeypatch.setattr(Noise, "exponential", drawn)
    pick_backend = expert_ffn.pick_backend
    masked = {"loop": "masked"}  # the loop reads values; masking keeps more in memory than it
    monkeypatch.setattr(expert_ffn, "pick_backend", lambda *given: masked.get(backend := pick_backend(*given), backend))
    made: list[int] = []

    def ready(count: int) -> None:
        made.append(count)
        if len(made) == 2 and sum(made) < images:
            raise Enough

    with torch.inference_mode(), FakeTensorMode():
        without_values(model.transformer, dtype)
        without_values(model.tokenizer, torch.float32)
        with watch, suppress(Enough):
            labels = Labels.of(torch.zeros(images, dtype=torch.int64), model.config.classes)
            model.generate(labels, chunk=images, on_images=ready)
    assert made == ([images] if model.images_at_once() >= images else [model.images_at_once()] * 2)
    return int(watch.peak)


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "images", "at_once"),
    [
        ("fashion", "dense", torch.float32, 256, 280),
        ("d16", "sparse", torch.bfloat16, 64, 8),
        ("d16", "folded", torch.float32, 64, 8),
    ],
)
def test_large_batches_stay_within_what_is_granted(
    name: str,
    kind: str,
    dtype: torch.dtype,
    images: int,
    at_once: int,
    memory_watch: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = without_weights(name, kind)
    config, side = model.config, model.tokenizer.config.image_size
    peak = peak_of(model, dtype, images, memory_watch, monkeypatch)
    assert model.images_at_once() == at_once
    pictures = 12 * side**2 * images
    numbers = 4 * config.schedule.total * config.vocab * images if images > at_once else 0
    assert 0.1 * GRANTED < peak - pictures - numbers <= GRANTED


def test_an_image_of_one_row_takes_less() -> None:
    """The decoder of d16 outweighs its rows; a smaller one lets them decide."""
    config, tokenizer = shapes("d16")
    small = tokenizer.model_copy(update={"ch": 32})
    paired, folded = (images_at_once(config, small, 4, "cpu", rows) for rows in (2, 1))
    assert images_at_once(config, small, 4, "cpu") == paired and 1.6 * paired < folded < 2 * paired + 1
    for kind, expected in (("sparse", 2), ("folded", 1)):
        model = without_weights("fashion", kind)
        given = model.config, model.tokenizer.config, 4, "cpu"
        assert model.guidance().rows == expected
        model.to_empty(device="cpu")
        assert model.images_at_once() == images_at_once(*given, expected)
