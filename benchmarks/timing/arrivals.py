"""Latency under load: measured service times in a simulated queue of one server that takes images in their order.

Early exit makes service times unequal: a mean below the full network's shortens the queue, and their spread lengthens
it. Arrivals are a Poisson process; each arriving image is one of the measured images, with its measured time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Arrivals per second, as a share of what the network serves that runs all exits on every image."""
_ARRIVALS = 20_000


def latencies(service: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Return the time from each image's arrival to its prediction, [N].

    Args:
        service: seconds that each image takes, in the order of arrival, [N].
        gaps: seconds between each arrival and the one before, [N].
    """
    arrival, busy = np.cumsum(gaps), np.cumsum(service)
    # An image starts when it has arrived and all before it are served: the server is idle or has worked since a start.
    waited: np.ndarray = np.maximum.accumulate(arrival - (busy - service)) + busy - arrival
    return waited


def under_load(seconds: Mapping[str, Sequence[float]], full: Sequence[float], seed: int = 0) -> list[dict[str, Any]]:
    """Return the percentiles of latency of several ways to predict, in milliseconds, at each of `LOADS`.

    All ways get the same images at the same times.

    Args:
        seconds: {name: seconds for each measured image, one image at a time}; the images are the same for all names.
        full: those of the network that runs all exits, which defines the load.
        seed: seed of the arrivals.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(full), size=_ARRIVALS)
    gaps = generator.exponential(size=_ARRIVALS)
    capacity = 1 / float(np.mean(full))
    rows = []
    for load in LOADS:
        ways = {}
        for name, measured in seconds.items():
            milliseconds = 1000 * latencies(np.asarray(measured)[drawn], gaps / (load * capacity))
            p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99]).tolist()
            ways[name] = {"p50": p50, "p95": p95, "p99": p99, "mean": float(milliseconds.mean())}
        rows.append({"load": load, "images_per_second": load * capacity, "ways": ways})
    return rows
