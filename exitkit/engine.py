"""The engine: device, precision and ranks. It makes local gradients, averages them over the ranks, then updates.

`DistributedDataParallel` is not used: several backwards on one forward, `autograd.grad` and forward-mode products, on
which half of the methods rest, are not averaged (or fail) under it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exitkit.errors import UserError
from exitkit.synced_batchnorm import synchronise_batchnorm

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""fp32; tf32 (fp32 with TensorFloat-32 products, CUDA); bf16 and fp16 autocast, the latter with loss scaling."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA where there is one, then MPS, then the CPU.

    Raises:
        UserError: no such device here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda, cuda:N or mps") from None
    here = [kind for kind, there in available.items() if there]
    if device.type not in here:
        raise UserError(f"device {name!r} is not available here; expected one of auto, {', '.join(here)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not here; there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return device


class Engine:
    """One process's share of the work: its device, its precision and its rank among `world` processes.

    Attributes:
        share: what this rank's mean over its batch counts in the mean over all ranks: its images times `world`, over
            the images of the global batch. 1 wherever the ranks' batches are equal; set with every batch.
    """

    def __init__(self, device: torch.device, precision: Precision = "fp32", rank: int = 0, world: int = 1) -> None:
        self.device = device
        self.precision = precision
        self.rank = rank
        self.world = world
        self.share = 1.0
        self._made_group = False
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    @classmethod
    def launch(cls, device: str, precision: Precision, threads: int) -> Engine:
        """Set this process up, and join the other ranks where `torchrun` started it.

        Args:
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; under torchrun each rank takes the GPU of its number.
            precision: see `Precision`.
            threads: CPU threads of this process.
        """
        torch.set_num_threads(threads)
        world, rank, local = (_from_torchrun(name, default) for name, default in _TORCHRUN.items())
        if world > 1 and device == "auto" and not torch.cuda.is_available():
            device = "cpu"  # ranks can't talk to one another on MPS
        chosen = choose_device(f"cuda:{local}" if world > 1 and device in ("auto", "cuda") else device)
        if world > 1 and chosen.type == "mps":
            raise UserError("several ranks can't train on mps; expected --device cpu, or one process")
        if precision == "tf32" and chosen.type != "cuda":
            raise UserError(
                f"precision tf32 needs a CUDA device, and this is {chosen.type}; expected fp32, bf16 or fp16"
            )
        engine = cls(chosen, precision, rank, world)
        engine.set_arithmetic()
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
            engine._made_group = True
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the process group, so that no rank waits for one that is gone."""
        if self._made_group:
            dist.destroy_process_group()

    def set_arithmetic(self) -> None:
        """Make CUDA reproducible, and let it use TensorFloat-32 only where the precision says so."""
        if self.device.type != "cuda":
            return
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.cuda.set_device(self.device)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    @property
    def channels_last(self) -> bool:
        """Whether images and convolutions are laid out channels-last: where tensor cores gain from it."""
        return self.device.type == "cuda" and self.precision != "fp32"

    def place(self, network: nn.Module) -> None:
        """Move the network here, and make its batch normalisation look at the batches of all ranks."""
        if self.world > 1:
            synchronise_batchnorm(network)
        if self.channels_last:
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            network.to(self.device)

    def images(self, images: Tensor) -> Tensor:
        """Move a batch of images here, in the layout that the network has."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=self.device.type == "cuda", memory_format=layout)

    def labels(self, labels: Tensor) -> Tensor:
        """Move a batch of labels here."""
        return labels.to(self.device, non_blocking=self.device.type == "cuda")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that forward passes run in."""
        if self.precision not in _AUTOCAST:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.precision])

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor | None]) -> None:
        """Average each tensor over the ranks, in place; None (a parameter not reached) is None on every rank."""
        present = [tensor for tensor in tensors if tensor is not None]
        if self.world == 1 or not present:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in present])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, piece in zip(present, flat.split([t.numel() for t in present]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    @torch.no_grad()
    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks of a tensor on the CPU."""
        if self.world == 1:
            return tensor
        summed = tensor.to(self.device, copy=True)  # NCCL knows only what is on a GPU
        dist.all_reduce(summed)
        return summed.cpu()

    @torch.no_grad()
    def gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors one after the other along the batch, which may be of different lengths."""
        if self.world == 1:
            return tensor
        lengths = self._lengths(len(tensor))
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def own(self, gathered: Tensor, count: int) -> Tensor:
        """Return this rank's `count` rows of what `gather` returned."""
        if self.world == 1:
            return gathered
        start = sum(self._lengths(count)[: self.rank])
        return gathered[start : start + count]

    def _lengths(self, count: int) -> list[int]:
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([count], device=self.device))
        return [int(size) for size in sizes]

    def place_in_batch(self, count: int) -> tuple[int, int]:
        """Return where this rank's `count` images begin in the global batch, and how many that has.

        Batches are dealt out by `tensor_split` (feed.py): in order, the first ranks getting one more.
        """
        total = round(count * self.world / self.share)
        each, more = divmod(total, self.world)
        return self.rank * each + min(self.rank, more), total

    def forked_randomness(self) -> contextlib.AbstractContextManager[None]:
        """Return a context after which torch's generators stand where they stood before."""
        on_gpu = self.device.type == "cuda"
        forked: contextlib.AbstractContextManager[None] = torch.random.fork_rng(
            [self.device.index or 0] if on_gpu else [], device_type="cuda"
        )
        return forked

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Set each parameter's `grad` to the gradient of `loss`, averaged over the ranks (scaled in fp16)."""
        for parameter in parameters:
            parameter.grad = None
        self.scaler.scale(self.weighed(loss)).backward()
        self.average([parameter.grad for parameter in parameters])

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradient of `loss`, averaged over the ranks, and keep the graph for the next loss."""
        scaled = self.scaler.scale(self.weighed(loss))
        found = torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)
        scale = self.scaler.get_scale()
        gradients: list[Tensor | None] = [g if g is None or scale == 1 else g / scale for g in found]
        self.average(gradients)
        return gradients

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the global batch of what is a mean over the local one."""
        averaged = self.weighed(tensor.detach()).clone()
        self.average([averaged])
        return averaged

    def weighed(self, local_mean: Tensor) -> Tensor:
        """Return a mean over the local batch as this rank's share of the mean over the ranks."""
        if self.share == 0:  # no image here: its mean is not a number, and counts nothing
            local_mean = local_mean.nan_to_num()
        return local_mean if self.share == 1 else local_mean * self.share

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimiser on the gradients in place (in fp16: unscaled, and not at all if one overflowed)."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def apply(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        gradients: Iterable[Tensor | None],
    ) -> None:
        """Step the optimiser on given gradients; a parameter whose gradient is None is left alone."""
        scale = self.scaler.get_scale()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None or scale == 1 else gradient * scale
        self.update(optimizer)


_TORCHRUN = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
"""What torchrun tells its processes, and what holds without it."""


def _from_torchrun(name: str, default: int) -> int:
    told = [variable for variable in _TORCHRUN if variable in os.environ]
    if told and len(told) < len(_TORCHRUN):
        missing = ", ".join(sorted(set(_TORCHRUN) - set(told)))
        raise UserError(f"{', '.join(told)} is set but {missing} is not; start several ranks by torchrun, or unset it")
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(f"{name} is {os.environ[name]!r}; expected a number, as torchrun sets it") from None
