"""Seeds and generators that depend on their purpose only, not on earlier work in the process."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts and nothing else (`derive(seed, "order", epoch)`)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `derive(*parts)`."""
    return torch.Generator().manual_seed(derive(*parts))


def numpy_and_python_states() -> tuple[Any, ...]:
    """Return the states of the global random numbers of Python and NumPy."""
    state = np.random.get_state(legacy=False)
    return random.getstate(), {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}


def restore_numpy_and_python(states: tuple[Any, ...]) -> None:
    """Restore the states that `numpy_and_python_states` returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextlib.contextmanager
def seeded_everywhere(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global random numbers of torch, NumPy and Python inside the block, and restore them at its end."""
    before = numpy_and_python_states()
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            restore_numpy_and_python(before)
