"""What a run takes from the machine."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from actvar_convert.errors import InputError
from actvar_convert.runtime import (
    limit_threads,
    peak_memory_bytes,
    pick_device,
    pick_dtype,
    reset_peak_memory,
    seed_everything,
)


def test_a_device_by_name_and_by_default() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match="device"):
        pick_device(name)


def test_number_formats() -> None:
    cpu = torch.device("cpu")
    formats = [pick_dtype(name, cpu) for name in (None, "fp32", "bf16", "fp16")]
    assert formats == [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(InputError, match="fp32, bf16, fp16"):
        pick_dtype("float8", cpu)


def test_equal_seeds_give_equal_numbers() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(7) == draw(7)
    assert all(a != b for a, b in zip(draw(7), draw(8), strict=True))


def test_peak_memory_sees_what_was_freed() -> None:
    reset_peak_memory()
    before = peak_memory_bytes()
    size = 64 * 2**20
    block = torch.ones(size, dtype=torch.uint8)
    del block
    assert peak_memory_bytes() - before > size // 2


def test_threads_are_at_least_one() -> None:
    assert 1 <= limit_threads() == torch.get_num_threads()
