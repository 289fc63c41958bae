"""Ranks: the processes that train one run together, started by torchrun, and their communication."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from exitkit.errors import UserError

_TORCHRUN = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
"""The environment variables that torchrun sets, and their values without torchrun."""

_PATIENCE = timedelta(days=2)
"""Time limit of a barrier, where ranks wait for one that evaluates or holds a lock; torchrun ends all if it dies."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` processes.

    Gradients and statistics are averaged with equal weight per rank; where the ranks have different numbers of images,
    a local mean is multiplied by the batch's rank weight first (`LocalBatch.rank_weight`).
    """

    rank: int = 0
    world: int = 1
    waiting: dist.ProcessGroup | None = None
    """The process group of `barrier`, with a long time limit; None: the default group."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor | None]) -> None:
        """Average each tensor over the ranks, in place; None (no gradient) must be None on every rank."""
        present = [tensor for tensor in tensors if tensor is not None]
        if self.world == 1 or not present:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in present])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, piece in zip(present, flat.split([t.numel() for t in present]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    @torch.no_grad()
    def total(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return the sum over the ranks of a tensor on the CPU; the ranks communicate on `device`."""
        if self.world == 1:
            return tensor
        summed = tensor.to(device, copy=True)  # NCCL accepts GPU tensors only
        dist.all_reduce(summed)
        return summed.cpu()

    @torch.no_grad()
    def gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors [b, ...], concatenated to [B, ...]; the local batch sizes b may differ."""
        if self.world == 1:
            return tensor
        lengths = self._lengths(tensor)
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def local_rows(self, gathered: Tensor, local: Tensor) -> Tensor:
        """Return the rows of `gathered`, the result of `gather(local)`, that belong to this rank."""
        if self.world == 1:
            return gathered
        start = sum(self._lengths(local)[: self.rank])
        return gathered[start : start + len(local)]

    def _lengths(self, tensor: Tensor) -> list[int]:
        sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
        return [int(size) for size in sizes]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(self.waiting)


def torchrun_variables() -> tuple[int, int, int]:
    """Return (world size, rank, local rank) as torchrun sets them; (1, 0, 0) without it.

    Raises:
        UserError: only some of the variables are set, or one is not an integer.
    """
    present = [variable for variable in _TORCHRUN if variable in os.environ]
    if present and len(present) < len(_TORCHRUN):
        missing = ", ".join(sorted(set(_TORCHRUN) - set(present)))
        stated = f"{', '.join(present)} is set but {missing} is not"
        raise UserError(f"{stated}; start several ranks with torchrun, or unset {', '.join(present)}")
    values = []
    for name, default in _TORCHRUN.items():
        try:
            values.append(int(os.environ.get(name, default)))
        except ValueError:
            raise UserError(f"{name} is {os.environ[name]!r}; expected an integer, as torchrun sets it") from None
    world, rank, local = values
    return world, rank, local


@contextlib.contextmanager
def join_ranks(world: int, rank: int, backend: str) -> Iterator[Ranks]:
    """Join the other ranks until the end of the block.

    The process group is created once and kept until the process exits: a second group of one process would read the
    first one's addresses in torchrun's store, and hang. At exit it is destroyed, so that no rank waits for another.
    """
    if world == 1:
        yield Ranks()
        return
    if not dist.is_initialized():
        dist.init_process_group(backend)
        atexit.register(_leave)
    if dist.get_backend() != backend:
        raise UserError(f"these ranks communicate by {dist.get_backend()}, which the device can't; use one device")
    waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, world, waiting)
    finally:
        dist.destroy_process_group(waiting)


def _leave() -> None:
    if dist.is_initialized():  # the caller may have destroyed it
        dist.destroy_process_group()
