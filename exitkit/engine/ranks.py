"""Ranks: the processes that train one run together, started by torchrun, and their communication."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten

import torch
import torch.distributed as dist
from torch import Tensor

from exitkit.errors import UserError

_TORCHRUN = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
"""The environment variables that torchrun sets, and their values without torchrun."""

_PATIENCE = timedelta(days=2)
"""Time limit of a barrier, where ranks wait for one that evaluates or holds a lock; torchrun ends all if it dies."""

_ARRIVAL = timedelta(minutes=30)
"""Time limit for all ranks to start."""

_READING = 10.0
"""Seconds for the other ranks to read why this one ends."""

_SHOWN = 3
"""Number of differences between ranks that a message names."""


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
        all_reduce(flat)
        flat /= self.world
        for tensor, piece in zip(present, flat.split([t.numel() for t in present]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    @torch.no_grad()
    def total(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return the sum over the ranks of a tensor on the CPU; the ranks communicate on `device`."""
        if self.world == 1:
            return tensor
        summed = tensor.to(device, copy=True)  # NCCL accepts GPU tensors only
        all_reduce(summed)
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
        with _connected():
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
        with _connected():
            dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
        return [int(size) for size in sizes]

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[dict[str, str]]:
        """Let all ranks go on after the block, or none.

        Inside the block, ranks may communicate only before anything that can fail on a single rank.

        Yields:
            an empty dictionary, for facts {name: value} that must be the same on all ranks.

        Raises:
            UserError: on every rank, if a rank raises it in the block, or if a fact differs.
        """
        facts: dict[str, str] = {}
        own: UserError | None = None
        try:
            yield facts
        except UserError as error:
            own = error
        if self.world == 1:
            everyone: list[tuple[str, dict[str, str]]] = []
        else:
            everyone = [("", {})] * self.world
            with _connected():
                dist.all_gather_object(everyone, (str(own or ""), facts), group=self.waiting)
        if own is not None:
            raise own
        for rank, (message, _) in enumerate(everyone):
            if message:
                raise UserError(f"rank {rank}: {message}")
        for rank, (_, others) in enumerate(everyone):
            _check_same(rank, others, everyone[0][1])


def all_reduce(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the ranks.

    Raises:
        UserError: the ranks can't communicate.
    """
    with _connected():
        dist.all_reduce(tensor)


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Raise a UserError if the ranks can't communicate in the block; the usual reason is that one has ended."""
    try:
        yield
    except RuntimeError as error:  # the base class of torch's errors of networks and backends
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the ranks can't communicate ({reason}); the message of another rank may state why") from None


def _check_same(rank: int, facts: Mapping[str, str], first: Mapping[str, str]) -> None:
    """Compare the facts of a rank with those of rank 0.

    Raises:
        UserError: they differ; the message has the names and both values.
    """
    names = [name for name in {**first, **facts} if first.get(name) != facts.get(name)]
    if not names:
        return
    values = [[shorten(of.get(name, "absent"), 60, placeholder="...") for of in (facts, first)] for name in names]
    shown = [f"{name} is {own} instead of {other}" for name, (own, other) in zip(names, values, strict=True)]
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    differences = ", ".join([*shown[:_SHOWN], *more])
    hint = "start all ranks with the same command, images and code"
    raise UserError(f"rank {rank} differs from rank 0: {differences}; {hint}")


def torchrun_variables() -> tuple[int, int, int]:
    """Return (world size, rank, local rank) as torchrun sets them; (1, 0, 0) without it.

    Raises:
        UserError: only some of the variables are set, or one is not an integer in its range.
    """
    present = [variable for variable in _TORCHRUN if variable in os.environ]
    if present and len(present) < len(_TORCHRUN):
        missing = ", ".join(sorted(set(_TORCHRUN) - set(present)))
        stated = f"{', '.join(present)} is set but {missing} is not"
        raise UserError(f"{stated}; start several ranks with torchrun, or unset {', '.join(present)}")
    world, rank, local = (_variable(name, default) for name, default in _TORCHRUN.items())
    if not 0 <= rank < world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {world}; expected a RANK from 0 to WORLD_SIZE - 1")
    return world, rank, local


def _variable(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(f"{name} is {os.environ[name]!r}; expected an integer, as torchrun sets it") from None


def rank_device(name: str, world: int, local: int, gpus: int) -> str:
    """Return the device of a rank: with several ranks, each has a GPU of its own, or all compute on the CPU.

    Args:
        name: the device of the recipe.
        world: number of ranks.
        local: number of this rank among those of its machine, from 0.
        gpus: number of GPUs of this machine.

    Raises:
        UserError: several ranks would share a GPU.
    """
    if world == 1:
        return name
    if name == "auto" and not gpus:
        return "cpu"  # ranks can't communicate on MPS
    here = _variable("LOCAL_WORLD_SIZE", world)
    if name in ("auto", "cuda") and here > gpus > 0:
        raise UserError(f"{here} ranks need {here} GPUs on this machine, which has {gpus}; start {gpus} ranks on it")
    if name.startswith("cuda:") and here > 1:
        raise UserError(
            f"--device {name} puts {here} ranks on one GPU; expected --device cuda, which gives each rank its own"
        )
    return f"cuda:{local}" if name in ("auto", "cuda") else name


@contextlib.contextmanager
def join_ranks(world: int, rank: int, backend: str) -> Iterator[Ranks]:
    """Join the other ranks until the end of the block.

    The process group is created once and kept until the process exits: a second group of one process would read the
    first one's addresses in torchrun's store, and hang. At exit it is destroyed, so that no rank waits for another.

    Raises:
        UserError: the ranks expect different numbers of ranks or kinds of device, or can't communicate.
    """
    if world == 1:
        yield Ranks()
        return
    if not dist.is_initialized():
        with _connected():
            _meet(world, rank, backend)
        atexit.register(_leave)
    if dist.get_backend() != backend:
        raise UserError(f"these ranks communicate by {dist.get_backend()}, which the device can't; use one device")
    with _connected():
        waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, world, waiting)
    finally:
        dist.destroy_process_group(waiting)


def _meet(world: int, rank: int, backend: str) -> None:
    """Create the process group; first compare the facts without which ranks would wait for each other forever."""
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdigit():
        given = f"MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}"
        raise UserError(f"{given}; expected the address and port of rank 0; start several ranks with torchrun")
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # otherwise torchrun hosts the store
    # As `init_process_group` would make it, but without a wait for `world` ranks, which may not exist.
    store = dist.TCPStore(host, int(port), world, hosts, _ARRIVAL, wait_for_workers=False, multi_tenant=hosts)
    facts = {"number of ranks": str(world), "device": "a GPU" if backend == "nccl" else "the CPU"}
    store.set(f"exitkit/{rank}", json.dumps(facts))
    first: dict[str, str] = json.loads(store.get("exitkit/0"))
    try:
        for other in range(1, world):
            _check_same(other, json.loads(store.get(f"exitkit/{other}")), first)
    except UserError:
        # Who ends first takes the store with it (rank 0), or has the others ended (under torchrun).
        readers = min(world, int(first["number of ranks"]))
        deadline = time.monotonic() + _READING
        with contextlib.suppress(RuntimeError):
            store.add("exitkit/readers", 1)
            while store.add("exitkit/readers", 0) < readers and time.monotonic() < deadline:
                time.sleep(0.05)
        raise
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def _leave() -> None:
    if dist.is_initialized():  # the caller may have destroyed it
        dist.destroy_process_group()
