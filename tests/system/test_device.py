"""What a run takes from the machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from actvar_convert.errors import InputError
from actvar_convert.system import device as runtime
from actvar_convert.system.device import (
    autocast_dtype,
    bf16_is_emulated,
    free_memory_bytes,
    largest_memory_bytes,
    limit_threads,
    memory_text,
    peak_memory_bytes,
    pick_device,
    pick_dtype,
    reset_peak_memory,
    trim_memory,
)


def test_a_device_by_name_and_by_default() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match="device"):
        pick_device(name)


def test_dtypes_by_their_names() -> None:
    cpu = torch.device("cpu")
    for given in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        assert pick_dtype(given, cpu) == torch.bfloat16
    formats = [pick_dtype(name, cpu) for name in (None, "fp32", "bf16", "fp16")]
    assert formats == [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(InputError, match="fp32, bf16, fp16"):
        pick_dtype("float8", cpu)


@pytest.mark.parametrize(
    ("has", "emulated"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64"}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_a_cpu_without_instructions_for_bf16(
    has: dict[str, object], emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert bf16_is_emulated(torch.device("cpu")) is emulated
    assert not bf16_is_emulated(torch.device("cuda"))


def test_peak_memory_sees_what_was_freed() -> None:
    reset_peak_memory()
    before = peak_memory_bytes()
    size = 64 * 2**20
    block = torch.ones(size, dtype=torch.uint8)
    del block
    assert peak_memory_bytes() - before > size // 2


def test_the_largest_memory_outlives_a_new_reading() -> None:
    size = 64 * 2**20
    before = largest_memory_bytes()
    block = torch.ones(size, dtype=torch.uint8)
    most = largest_memory_bytes()
    del block
    reset_peak_memory()
    assert before > 0 and largest_memory_bytes() >= 0.98 * most  # the system counts in steps


def test_threads_are_at_least_one() -> None:
    assert 1 <= limit_threads() == torch.get_num_threads()


def test_memory_in_words() -> None:
    assert [memory_text(size) for size in (0, 300_400, 35_400_000, 999_000_000, 1_900_000_000)] == [
        "0 kB",
        "300 kB",
        "35 MB",
        "1.0 GB",
        "1.9 GB",
    ]


def test_free_memory_is_what_is_left_and_what_this_process_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = SimpleNamespace(rss=300, shared=100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: own))
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path)
    assert free_memory_bytes() == 5200
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2500\ninactive_file 400\nactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes() == 5200
    (tmp_path / "memory.max").write_text("4000\n")
    assert free_memory_bytes() == 4000 - 3000 + 450 + 200


def test_memory_that_was_freed_can_be_handed_back_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    trim_memory()
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: object())  # a system without the call
    trim_memory()


def test_nothing_is_cast_for_fp32() -> None:
    assert [autocast_dtype(name) for name in ("fp32", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]
