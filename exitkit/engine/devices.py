"""Devices: choosing one, and moving networks and images to it in the right memory layout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exitkit.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA where there is one, then MPS, then the CPU.

    Raises:
        UserError: no such device on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = [kind for kind, present in available.items() if present]
    if name == "auto":
        name = kinds[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in kinds:
        raise UserError(f"device {name!r} is not available here; expected one of auto, {', '.join(kinds)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not here; there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return device


@dataclass(frozen=True)
class Placement:
    """A device, and the memory layout of images and convolutions on it.

    Args:
        device: the device.
        channels_last: use the channels-last layout.
    """

    device: torch.device
    channels_last: bool = False

    def network(self, network: nn.Module) -> None:
        """Move a network to the device, in place."""
        if self.channels_last:
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        else:
            network.to(self.device)

    def images(self, images: Tensor) -> Tensor:
        """Return a batch of images [B, C, H, W] on the device, in the layout of the network."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=self.device.type == "cuda", memory_format=layout)

    def labels(self, labels: Tensor) -> Tensor:
        """Return a batch of labels [B] on the device."""
        return labels.to(self.device, non_blocking=self.device.type == "cuda")

    def forked_randomness(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that restores the states of torch's random generators at its end."""
        on_gpu = self.device.type == "cuda"
        forked: contextlib.AbstractContextManager[None] = torch.random.fork_rng(
            [self.device.index or 0] if on_gpu else [], device_type="cuda"
        )
        return forked


@contextlib.contextmanager
def process_settings(device: torch.device, *, tf32: bool = False, threads: int | None = None) -> Iterator[None]:
    """Set the process up for reproducible work on a device, and restore its settings at the end.

    Args:
        device: CUDA devices are made reproducible: deterministic kernels, no benchmarking of algorithms.
        tf32: allow TensorFloat-32 products on CUDA.
        threads: CPU threads of this process; None leaves them as they are.
    """
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with _deterministic_cuda(device, tf32) if device.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        if threads is not None:
            torch.set_num_threads(threads_before)


@contextlib.contextmanager
def _deterministic_cuda(device: torch.device, tf32: bool) -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
        matmul.allow_tf32,
        cudnn.allow_tf32,
        torch.cuda.current_device(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS starts: it can't be restored
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark = False
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        deterministic, warn_only, cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32, current = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.cuda.set_device(current)
