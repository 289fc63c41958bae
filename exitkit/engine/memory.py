"""How much memory training took at most."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

_MIB = 2**20


def give_back_freed() -> None:
    """Give memory that an earlier run in this process has freed back to the system, so that it counts for no later one.

    Only glibc can be asked to; elsewhere nothing happens.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def begin_peak(device: torch.device) -> None:
    """Forget earlier peaks, where the device or the system lets one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux: then it is the peak since the process began
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> float:
    """Return the most memory since `begin_peak`, in MiB: what tensors took on a GPU, else the whole process.

    On MPS and on Windows, which do not tell, it is NaN.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if device.type != "cpu":
        return float("nan")
    with contextlib.suppress(OSError, IndexError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    try:
        # Imported when used: Windows has no such module.
        import resource
    except ImportError:
        return float("nan")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / _MIB if sys.platform == "darwin" else most / 1024
