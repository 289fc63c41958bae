"""Energy of the CPU in joules from Linux's RAPL counters, which many machines and most containers do not provide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RAPL = Path("/sys/class/powercap")


def _name(domain: Path) -> str:
    try:
        return (domain / "name").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def energy_meter(device: str, root: Path = RAPL) -> Callable[[], float] | None:
    """Return a function that reads the joules used so far by all CPU packages; None if they are not available.

    The counters are for the whole machine and include other processes. They do not include GPUs, so the result is None
    for other devices than "cpu".
    """
    domains = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    packages = [path for path in domains if _name(path).startswith("package")]  # psys contains the packages
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
        # A counter restarts at 0 after its limit.
        total += sum((new - old) % limit for new, old, limit in zip(now, last, limits, strict=True))
        last = now
        return total / 1e6

    return read
