"""The time of a training step against the limits of the core: its arithmetic, and its memory.

The arithmetic of a step is counted by PyTorch's formulas of convolutions and matrix products. Its memory traffic counts
every operation of the plain step as one that reads its inputs and writes its results once, in the machine's memory.
The arithmetic is a lower bound of the time. The memory is an estimate without caches: an operation that finds its
inputs in a cache is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from exitkit.benchmarks.speed.timing import median_seconds, seconds
from exitkit.benchmarks.speed.work import Work

_SIZE = 1024  # rows and columns of the matrices
_BYTES = 2**28  # larger than a core's share of the caches
_REPEATS = 7


class Roofline(NamedTuple):
    """A joint training step in one precision, in seconds: the times of its two limits, and the measured time.

    Attributes:
        precision: fp32 or bf16.
        flops: peak of the core, floating-point operations per second.
        bandwidth: bytes per second that a core reads and writes.
        arithmetic: time of the step's operations at the peak.
        memory: time of the step's traffic at this bandwidth.
        measured: time of exitkit's step, channels last.
    """

    precision: Literal["fp32", "bf16"]
    flops: float
    bandwidth: float
    arithmetic: float
    memory: float
    measured: float


def rooflines(work: Work) -> Iterator[Roofline]:
    """Measure both limits of the core, and a joint step in fp32 and bf16."""
    operations, elements = counts(work)
    bandwidth = peak_bandwidth()
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for precision, dtype in zip(precisions, (torch.float32, torch.bfloat16), strict=True):
        step = work.step("joint", precision=precision, layout="channels-last")
        flops, measured = peak_flops(dtype), median_seconds(step, work.rounds)
        traffic = elements * dtype.itemsize / bandwidth
        yield Roofline(precision, flops, bandwidth, operations / flops, traffic, measured)


def peak_flops(dtype: torch.dtype, size: int = _SIZE) -> float:
    """Return the floating-point operations per second of a product of square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(_REPEATS))


def peak_bandwidth(size: int = _BYTES) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source, target = torch.zeros(2, size // 4)
    return 2 * size / min(seconds(lambda: target.copy_(source)) for _ in range(_REPEATS))


def counts(work: Work) -> tuple[float, float]:
    """Return the floating-point operations of a joint step, and the elements that it reads and writes."""
    network, (images, labels) = work.build().to("meta"), work.data()
    images, labels = images.to("meta"), labels.to("meta")
    traffic = _Traffic()
    with FlopCounterMode(display=False) as counter, traffic:
        losses = [F.cross_entropy(logits, labels) for logits in network(images).logits]
        torch.stack(losses).sum().backward()
    return float(counter.get_total_flops()), float(traffic.elements)


class _Traffic(TorchDispatchMode):
    """Counts the elements that operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::detach")):
            tensors = pytree.tree_leaves((args, kwargs, result))
            self.elements += sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
        return result
