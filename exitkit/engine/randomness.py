"""All randomness is a function of what it is for, never of what ran before in the process."""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else (`derive(seed, "order", epoch)`)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `derive(*parts)`."""
    return torch.Generator().manual_seed(derive(*parts))
