"""What a run takes from the machine: device, dtype, threads, memory readings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from actvar_convert.errors import InputError
from actvar_convert.system.dtype_names import short_dtype
from actvar_convert.system.launch import launched

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by the names that recipes and flags use."""

DtypeLike = str | torch.dtype
"""A dtype as callers give it: fp32, bf16, fp16, or torch's own or its name."""

_CGROUP = Path("/sys/fs/cgroup")


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without a name the GPU if there is one, else the CPU.

    Of several processes that a launcher started on a machine each gets a GPU of its own, unless a number is named.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or None.

    Raises:
        InputError: no such kind of device, or none of it on this machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = named_device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise InputError(f"device {name!r} asked for, torch sees {found} CUDA devices; give cpu, or leave it out")
        local = launched().local
        if device.index is None and local is not None:
            return torch.device("cuda", local % found)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' asked for, this machine has none; give cpu, or leave it out")
    return device


def named_device(name: str) -> torch.device:
    """The device of that name, whether this machine has it or not.

    Raises:
        InputError: no such kind of device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown; give cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported; give cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(given: DtypeLike | None, device: torch.device) -> torch.dtype:
    """The dtype that is given as fp32, bf16 or fp16, by torch's names, or as it is (None: fp32).

    Raises:
        InputError: an unknown name, or a GPU that cannot compute in bf16.
    """
    name = "fp32" if given is None else short_dtype(given)
    if name not in DTYPES:
        raise InputError(f"dtype {given!r} is unknown; give one of {', '.join(DTYPES)}")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise InputError(f"dtype bf16 is not supported by {torch.cuda.get_device_name(device)}; give fp16 or fp32")
    return DTYPES[str(name)]


def autocast_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name as autocast takes it: none for fp32, in which nothing is cast."""
    return None if name == "fp32" else DTYPES[name]


def bf16_is_emulated(device: torch.device) -> bool:
    """Whether a device is an x86 CPU without instructions for bf16, which it emulates; False if torch cannot say."""
    if device.type != "cpu":
        return False
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return has.get("architecture") == "x86_64" and not (has.get("avx512_bf16") or has.get("amx_bf16"))


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
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return affinity if quota == "max" else max(1, min(affinity, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return affinity


def end_process(code: int) -> NoReturn:
    """Ends the program with an exit code.

    One of several processes of a run ends at once, without the interpreter's clean-up: threads of the connection to the
    others outlive it now and then and abort the process, work long done, with a code that a launcher takes for failure.
    After a failure the connection is left as it is: the others may never come to its end.
    """
    if launched().count > 1:
        if code == 0 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything it was given; what a clock needs before it is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


_before_reset: dict[str, int] = {}
"""Peaks of the readings that were reset, by kind of device: a process has one of each, as it has one memory."""


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Starts a new reading of ``peak_memory_bytes`` (on Linux and CUDA; elsewhere the process's peak remains)."""
    kind = _kind(device)
    _before_reset[kind] = max(_before_reset.get(kind, 0), peak_memory_bytes(device))
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


def largest_memory_bytes(device: torch.device | None = None) -> int:
    """Largest memory in use since the process began, in bytes, whatever readings were started meanwhile."""
    return max(_before_reset.get(_kind(device), 0), peak_memory_bytes(device))


def _kind(device: torch.device | None) -> str:
    return "cuda" if device is not None and device.type == "cuda" else "machine"


def require_space(folder: Path, needed: int) -> None:
    """Checks that the disk of a folder, which need not exist yet, has room for ``needed`` bytes.

    Raises:
        InputError: there is less free space.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    total, _, free = shutil.disk_usage(existing)
    if total and free < needed:  # a system of no size, such as /proc, has another reason to refuse
        raise InputError(
            f"cannot write {folder}: it needs {memory_text(needed)} and the disk has {memory_text(free)} free. "
            "Free some space, or choose a folder elsewhere."
        )


def memory_text(size: float) -> str:
    """Bytes as people say them, of memory and of files: 1.9 GB, 35 MB, 300 kB."""
    if size >= 9.95e8:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 9.995e5 else f"{size / 1e3:.0f} kB"


def free_memory_bytes(device: torch.device | None = None) -> int:
    """Memory in bytes that this process could hold in all: what is free, and what it has already.

    Of a GPU, or of the machine; there a container's limit counts, and what is kept of files counts as free.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + int(torch.cuda.memory_reserved(device))
    own = psutil.Process().memory_info()
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no limit is the word "max"
        limit = int((_CGROUP / "memory.max").read_text())
        held = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        files = int(held["inactive_file"]) + int(held["active_file"])
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()) + files)
    return free + int(own.rss) - int(getattr(own, "shared", 0))


def memory_shortage(error: BaseException) -> str | None:
    """What an error says, in its first line, if it tells that memory ran out, of the machine or a GPU; else None."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return text or "out of memory on the GPU"
    if isinstance(error, MemoryError):
        return text or "out of memory"
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return text[text.index("can't allocate memory") :]
    return None


def trim_memory() -> None:
    """Hands back to the system what the allocator keeps of memory that was freed, where there is such a call."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def peak_memory_line() -> str:
    """The largest memory that this process has held, and that of its GPU if it used one."""
    line = f"peak memory {memory_text(largest_memory_bytes())}"
    gpu = largest_memory_bytes(torch.device("cuda")) if torch.cuda.is_available() else 0
    return f"{line}, on the GPU {memory_text(gpu)}" if gpu else line
