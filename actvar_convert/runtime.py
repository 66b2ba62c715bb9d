"""What a run takes from the machine: device, number format, threads, random state, memory readings."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import psutil
import torch

from actvar_convert.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Number formats by the names that recipes and flags use."""


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without a name the GPU where there is one, else the CPU.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or None.

    Raises:
        InputError: no such kind of device, or none of it on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; give cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported; give cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise InputError(f"device {name!r} asked for, torch sees {found} CUDA devices; give cpu, or leave it out")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' asked for, this machine has none; give cpu, or leave it out")
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The number format of that name (fp32, bf16, fp16; None: fp32), checked against the device.

    Raises:
        InputError: an unknown name, or a GPU that cannot compute in bf16.
    """
    if name is None:
        return torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; give one of {', '.join(DTYPES)}")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(f"dtype bf16 is not supported by {torch.cuda.get_device_name(device)}; give fp16 or fp32")
    return DTYPES[name]


def seed_everything(seed: int) -> None:
    """Sets the global random state of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def limit_threads() -> int:
    """Lets torch use as many threads as this process has cores, container quotas included; returns the number.

    A number set by hand (``OMP_NUM_THREADS``) stays.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), _available_cores())))
    return torch.get_num_threads()


def _available_cores() -> int:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return affinity if quota == "max" else max(1, min(affinity, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return affinity


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything it was given; what a clock needs before it is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Starts a new reading of ``peak_memory_bytes`` (on Linux and CUDA; elsewhere the process's peak remains)."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Largest memory in use since the last reset, in bytes: of a GPU's allocator, else of the whole process."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
