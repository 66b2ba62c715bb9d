"""Data in the layout of Fashion-MNIST, made of random pixels, and trainings of a few steps."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actvar_convert.models.var.config import TransformerConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

IMAGES = {"train": 160, "t10k": 40}
HELD_OUT = 20


def write_idx(path: Path, array: np.ndarray) -> None:
    """One file of the MNIST family."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files: pixels brighter the larger the label, every label equally often."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in IMAGES.items():
        labels = np.arange(count) % 10
        pixels = generator.integers(0, 56, (count, 28, 28)) + 20 * labels[:, None, None]
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


def tiny(config: TransformerConfig) -> TransformerConfig:
    """Two narrow blocks on the same pyramid."""
    return config.model_copy(update={"depth": 2, "width": 32, "heads": 1, "hidden": 32})


@pytest.fixture(autouse=True)
def same_random_state() -> Iterator[None]:
    """What tools draw or set for the whole process ends with the test."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def leaves(value: object, name: str = "") -> dict[str, Tensor]:
    """Every tensor within a checkpoint by its place."""
    if isinstance(value, Tensor):
        return {name: value}
    found: dict[str, Tensor] = {}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.update(leaves(inner, f"{name}/{key}"))
    return found


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Both files hold the same tensors, bit by bit."""
    a, b = (leaves(torch.load(path, weights_only=True)) for path in (one, other))
    assert a.keys() == b.keys() and len(a) > 10
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
