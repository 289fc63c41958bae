"""Seeds and generators that depend on their purpose only, not on earlier work in the process."""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts and nothing else (`derive(seed, "order", epoch)`)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `derive(*parts)`."""
    return torch.Generator().manual_seed(derive(*parts))
