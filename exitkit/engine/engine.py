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
from exitkit.engine.devices import Placement, choose_device, process_settings
from exitkit.engine.precision import Arithmetic, Precision
from exitkit.engine.ranks import Ranks, join_ranks, torchrun_variables
from exitkit.errors import UserError


class Engine:
    """The placement, arithmetic and rank of one process.

    Args:
        device: device of the computation.
        precision: see `Precision`.
        ranks: this process's rank; None: a single process.

    Raises:
        UserError: the device does not support the precision.
    """

    def __init__(self, device: torch.device, precision: Precision = "fp32", ranks: Ranks | None = None) -> None:
        self.arithmetic = Arithmetic(precision, device.type)
        self.placement = Placement(device, channels_last=device.type == "cuda" and precision != "fp32")
        self.ranks = ranks or Ranks()

    @property
    def device(self) -> torch.device:
        """The device of the placement."""
        return self.placement.device

    def place(self, network: nn.Module) -> None:
        """Move a network to the device; with several ranks its batch norm uses the global batch.

        On the CPU, 16-bit training uses the channels-last layout, unless the network is slower in it.
        """
        if self.arithmetic.is_reduced and self.device.type == "cpu":
            self.placement = Placement(self.device, channels_last=getattr(network, "channels_last", True))
        if self.ranks.world > 1:
            synchronise_batchnorm(network)
        self.placement.network(network)

    def backward(self, loss: Tensor, parameters: Sequence[nn.Parameter], rank_weight: float = 1.0) -> None:
        """Set each parameter's `grad` to the gradient of `loss`, averaged over the ranks (scaled in fp16).

        Args:
            loss: a mean over the local batch.
            parameters: the trained parameters.
            rank_weight: the rank weight of the local batch.
        """
        for parameter in parameters:
            parameter.grad = None
        self.arithmetic.scaled(rank_share(loss, rank_weight)).backward()
        self.ranks.average([parameter.grad for parameter in parameters])

    def gradients(self, loss: Tensor, tensors: Sequence[Tensor], rank_weight: float = 1.0) -> list[Tensor | None]:
        """Return the gradients of `loss`, averaged over the ranks (None: not reached); the graph is kept."""
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
def launch(device: str, precision: Precision, threads: int) -> Iterator[Engine]:
    """Configure this process and, under torchrun, join the other ranks; settings are restored at the end.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; under torchrun each rank takes the GPU of its local rank.
        precision: see `Precision`.
        threads: CPU threads of this process.

    Raises:
        UserError: this machine does not have the device or precision, or several ranks are to train on mps.
    """
    world, rank, local = torchrun_variables()
    if world > 1 and device == "auto" and not torch.cuda.is_available():
        device = "cpu"  # ranks can't communicate on MPS
    chosen = choose_device(f"cuda:{local}" if world > 1 and device in ("auto", "cuda") else device)
    if world > 1 and chosen.type == "mps":
        raise UserError("several ranks can't train on mps; expected --device cpu, or one process")
    engine = Engine(chosen, precision)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    with process_settings(chosen, tf32=precision == "tf32", threads=threads), join_ranks(world, rank, backend) as ranks:
        engine.ranks = ranks
        yield engine
