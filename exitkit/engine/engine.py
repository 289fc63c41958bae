"""The engine: local gradients, averaged over the ranks, then the update.

It combines a placement (device), an arithmetic (precision) and ranks. One rule holds for every method: a loss or
gradient is computed as a mean over the local batch; multiplied by the batch's rank weight and averaged over the ranks,
it is the mean over the global batch.

`DistributedDataParallel` is not used: it does not average (or fails at) several backward passes per forward pass,
`autograd.grad` and forward-mode products, which half of the methods need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from exitkit.engine.batchnorm import synchronise_batchnorm
from exitkit.engine.devices import Layout, Placement, choose_device, process_settings
from exitkit.engine.fused import compiled, fuse_batchnorm
from exitkit.engine.precision import Arithmetic, Precision
from exitkit.engine.ranks import Ranks, join_ranks, rank_device, torchrun_variables
from exitkit.errors import UserError


class Engine:
    """The placement, arithmetic and rank of one process.

    Args:
        device: device of the computation.
        precision: see `Precision`.
        ranks: this process's rank; None: a single process.
        layout: memory layout. `auto` is channels-last in 16 bits on CPUs, and in every precision but fp32 on CUDA
            devices; otherwise contiguous.

    Raises:
        UserError: the device does not support the precision.
    """

    def __init__(
        self,
        device: torch.device,
        precision: Precision = "fp32",
        ranks: Ranks | None = None,
        layout: Layout = "auto",
    ) -> None:
        self.device = device
        self.arithmetic = Arithmetic(precision, device.type)
        faster = precision != "fp32" if device.type == "cuda" else device.type == "cpu" and self.arithmetic.is_reduced
        self.placement = Placement(device, faster if layout == "auto" else layout == "channels-last")
        self.ranks = ranks or Ranks()

    def place(self, network: nn.Module) -> None:
        """Move a network to the device, in the engine's memory layout.

        With several ranks its batch norm uses the global batch; in a single process it is fused, if that is possible.
        """
        if self.ranks.world > 1:
            synchronise_batchnorm(network)
        elif self.fuses_batchnorm:
            fuse_batchnorm(network)
        self.placement.network(network)

    @property
    def fuses_batchnorm(self) -> bool:
        """Whether batch norm is replaced by that of `exitkit.engine.fused`."""
        single = self.ranks.world == 1 and self.device.type == "cpu"
        return single and self.placement.channels_last and compiled(self.arithmetic.dtype) is not None

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter], rank_weight: float = 1.0) -> None:
        """Set each parameter's `grad` to the gradient of `loss`, averaged over the ranks (scaled in fp16).

        Args:
            loss: a mean over the local batch.
            parameters: the trained parameters.
            rank_weight: the rank weight of the local batch.
        """
        for parameter in parameters:
            parameter.grad = None
        if loss.requires_grad:  # otherwise it depends on frozen parameters only
            self.arithmetic.scaled(rank_share(loss, rank_weight)).backward()
        self.ranks.average([parameter.grad for parameter in parameters])

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor], rank_weight: float = 1.0) -> list[Tensor | None]:
        """Return the gradients of `loss`, averaged over the ranks (None: not reached); the graph is kept."""
        if not loss.requires_grad:  # it depends on frozen parameters only
            return [None] * len(tensors)
        scaled = self.arithmetic.scaled(rank_share(loss, rank_weight))
        raw = torch.autograd.grad(scaled, tensors, retain_graph=True, allow_unused=True)
        gradients: list[Tensor | None] = [
            gradient if gradient is None else self.arithmetic.unscaled(gradient) for gradient in raw
        ]
        self.ranks.average(gradients)
        return gradients

    def mean(self, tensor: Tensor, rank_weight: float = 1.0) -> Tensor:
        """Return the mean over the global batch of a mean over the local batch."""
        averaged = rank_share(tensor.detach(), rank_weight).clone()
        self.ranks.average([averaged])
        return averaged

    def apply(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        gradients: Iterable[Tensor | None],
    ) -> None:
        """Step the optimiser with these gradients; a parameter whose gradient is None stays unchanged."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else self.arithmetic.rescaled(gradient)
        self.arithmetic.step(optimizer)


def rank_share(local_mean: Tensor, rank_weight: float) -> Tensor:
    """Return this rank's share of a mean over the global batch: the local mean times the rank weight."""
    if rank_weight == 0:  # this rank has no image: the mean over its empty batch is NaN
        local_mean = local_mean.nan_to_num()
    return local_mean if rank_weight == 1 else local_mean * rank_weight


@contextlib.contextmanager
def launch(
    device: str, precision: Precision, threads: int, layout: Layout = "auto", *, deterministic: bool = True
) -> Iterator[Engine]:
    """Configure this process and, under torchrun, join the other ranks; settings are restored at the end.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; under torchrun each rank takes the GPU of its local rank.
        precision: see `Precision`.
        threads: CPU threads of this process.
        layout: see `Engine`.
        deterministic: see `process_settings`.

    Raises:
        UserError: this machine does not have the device or precision; several ranks are to train on mps, or on one GPU;
            or the ranks differ in their number or kind of device.
    """
    world, rank, local = torchrun_variables()
    chosen = choose_device(rank_device(device, world, local, torch.cuda.device_count()))
    if world > 1 and chosen.type == "mps":
        raise UserError("several ranks can't train on mps; expected --device cpu, or one process")
    engine = Engine(chosen, precision, layout=layout)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    settings = process_settings(chosen, tf32=precision == "tf32", threads=threads, deterministic=deterministic)
    with settings, join_ranks(world, rank, backend) as ranks:
        engine.ranks = ranks
        yield engine
