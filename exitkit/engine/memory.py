"""Peak memory of training, and the memory of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_MIB = 2**20
_OWN_GROUPS = Path("/proc/self/cgroup")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of control groups of version 2 and 1, by their controller: the files of limit and use, and the name of the cache."""


def give_back_freed() -> None:
    """Return freed memory to the system, so that memory of an earlier run in this process is not measured again.

    This works with glibc only; elsewhere it does nothing.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_mib() -> float:
    """Return the memory that new processes can use, in MiB: of the system, or of this process's control groups.

    It is NaN where the system does not report it (outside Linux).
    """
    found = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        facts = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(int(facts.split("MemAvailable:")[1].split()[0]) / 1024)
    found += _left_in_groups()
    return min(found, default=float("nan"))


def _left_in_groups() -> Iterator[float]:
    """Yield what is left of the limit of each control group of this process, in MiB; pages of files can be freed."""
    lines = []
    with contextlib.suppress(OSError):
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in {*controllers.split(",")} & _FILES.keys():
            limit, use, cache = _FILES[controller]
            root = _CONTROL_GROUP / controller
            group = root / path.lstrip("/")
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
                with contextlib.suppress(OSError, ValueError):
                    most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, use))
                    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield (most - used + int(facts.get(cache, 0))) / _MIB


def begin_peak(device: torch.device) -> None:
    """Reset the measured peak, where the device or the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux: the peak since the process started is measured
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> float:
    """Return the peak memory since `begin_peak`, in MiB: of tensors on a GPU, otherwise of the whole process.

    It is NaN on MPS and on Windows, which do not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if device.type != "cpu":
        return float("nan")
    with contextlib.suppress(OSError, IndexError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    try:
        # Imported when used: Windows does not have this module.
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024
