"""What the processor has used, in joules, where Linux tells it (RAPL); many machines and most containers do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RAPL = Path("/sys/class/powercap")


def energy_meter(device: str, root: Path = RAPL) -> Callable[[], float] | None:
    """Return what reads the joules used so far by all processor packages; None where nothing tells them.

    The counters are the machine's: whatever else runs is counted, too. A GPU's energy is not in them, so that there is
    no meter for any device but the CPU.
    """
    packages = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    counters = [(path / "energy_uj", path / "max_energy_range_uj") for path in packages]
    try:
        readable = counters and all(int(counter.read_text()) >= 0 for counter, _ in counters)
        limits = [int(limit.read_text()) for _, limit in counters]
    except (OSError, ValueError):
        return None
    if device != "cpu" or not readable:
        return None
    last = [int(counter.read_text()) for counter, _ in counters]
    total = 0

    def read() -> float:
        nonlocal last, total
        now = [int(counter.read_text()) for counter, _ in counters]
        # A counter begins anew at its limit.
        total += sum((new - old) % limit for new, old, limit in zip(now, last, limits, strict=True))
        last = now
        return total / 1e6

    return read
