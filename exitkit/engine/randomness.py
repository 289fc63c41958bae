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


def seed_torch(device: torch.device, seed: int) -> None:
    """Seed torch's global generators of the CPU and of a device.

    `torch.manual_seed` gives the same numbers, but also seeds and prepares every other device: 0.1 ms a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def forked_randomness(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's global generators of the CPU and of a device at the end of the block."""
    on_gpu = device.type == "cuda"
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    index = [torch.cuda.current_device() if device.index is None else device.index] if on_gpu else []
    with torch.random.fork_rng(index, device_type="cuda"):
        try:
            yield
        finally:
            if on_mps is not None:
                torch.mps.set_rng_state(on_mps)


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
    with forked_randomness(device):
        seed_torch(device, seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            restore_numpy_and_python(before)
