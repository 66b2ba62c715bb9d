"""The fused kernels compiled for GPUs that are not here, as they would be launched; ptxas comes with Triton."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actvar_convert.files.layout import official_config
from actvar_convert.kernels.expert_weights import ExpertWeights

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from actvar_convert.kernels import expert_ffn_triton

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a program may ask for, by compute capability."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
"""The instruction that multiplies 16-bit tiles of many rows."""


class Compiles:
    """Stands in for a kernel: a launch compiles it and is noted."""

    def __init__(self, kernel: Any, compiled: dict[str, Any]) -> None:
        self._kernel, self._compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: object, **options: object) -> None:
            self._compiled[self._kernel.fn.__name__] = self._kernel.warmup(*args, grid=grid, **options)

        return launch


@pytest.fixture
def compiled(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What launches compile from here on, by kernel: for a GPU of this capability, without one."""
    target = GPUTarget("cuda", capability, 32)
    absent = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,  # kernels are kept per device
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(driver, "_active", absent)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(expert_ffn_triton, "SHARED_BYTES", SHARED_BYTES[capability])
    found: dict[str, Any] = {}
    for name in ("_keys", "_unions", "_hidden", "_outputs"):
        monkeypatch.setattr(expert_ffn_triton, name, Compiles(getattr(expert_ffn_triton, name), found))
    return found


@pytest.mark.parametrize("rows", [2, 64 * 2 * 256])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("var-d16", torch.bfloat16),
        ("var-d16", torch.float16),
        ("var-d16", torch.float32),
        ("var-d24", torch.bfloat16),
        ("var-d30", torch.bfloat16),
        ("var-d30", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_a_gpu_that_is_not_here(
    compiled: dict[str, Any], capability: int, name: str, dtype: torch.dtype, rows: int
) -> None:
    config, _ = official_config(name)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    C, H = config.width, config.hidden
    weights = ExpertWeights(empty(H, C), empty(H), empty(C, H), empty(C), experts=8)
    expert_ffn_triton.add_routed(empty(rows, C), empty(rows, C), weights, 2, empty(rows, 3, dtype=torch.int64))
    assert set(compiled) == {"_keys", "_unions", "_hidden", "_outputs"}
    for kernel, made in compiled.items():
        assert made.asm["ttgir"] and made.asm["ptx"] and made.asm["cubin"], kernel
        assert made.metadata.shared <= SHARED_BYTES[capability], f"{kernel} asks for {made.metadata.shared} bytes"
    if dtype != torch.float32 and rows > 2:
        assert all(TENSOR_CORES[capability] in compiled[kernel].asm["ptx"] for kernel in ("_hidden", "_outputs"))
