"""Devices: selection, and placement of networks and images in the right memory layout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from exitkit.engine.randomness import forked_randomness, seed_torch
from exitkit.errors import UserError

Layout = Literal["auto", "contiguous", "channels-last"]
"""Memory layout of images and convolutions; `auto` is channels-last where it is known to be faster, see `Engine`."""


Images = TypeVar("Images")


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA if available, otherwise MPS, otherwise the CPU.

    Raises:
        UserError: the name is invalid, or this machine does not have the device.
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
        raise UserError(f"device {name!r} is not available; expected one of auto, {', '.join(kinds)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"device {name!r} is not available; expected a CUDA device from cuda:0 to cuda:{last}")
    return device


@dataclass(frozen=True)
class Placement:
    """A device and the memory layout of images and convolutions on it.

    Args:
        device: where networks and batches are placed.
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

    def images(self, images: Images) -> Images:
        """Return a batch of images [B, C, H, W], or a structure of tensors, on the device in the network's layout."""
        placed: Images = pytree.tree_map_only(Tensor, self._placed, images)
        return placed

    def _placed(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last and images.dim() == 4 else torch.contiguous_format
        return images.to(self.device, non_blocking=self.device.type == "cuda", memory_format=layout)

    def labels(self, labels: Tensor) -> Tensor:
        """Return a batch of labels [B] on the device."""
        return labels.to(self.device, non_blocking=self.device.type == "cuda")

    def seed(self, seed: int) -> None:
        """Seed torch's global generators of the CPU and of the device; see `seed_torch`."""
        seed_torch(self.device, seed)

    def forked_randomness(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that restores the states of these generators at its end."""
        return forked_randomness(self.device)


def synchronise(device: torch.device) -> None:
    """Wait for the work of a device, whose calls return before it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def process_settings(
    device: torch.device, *, tf32: bool = False, threads: int | None = None, deterministic: bool = True
) -> Iterator[None]:
    """Configure the process for computation on a device, and restore its settings at the end.

    Args:
        device: the device; computation on the CPU is always deterministic.
        tf32: allow TensorFloat-32 products on CUDA.
        threads: CPU threads of this process; None keeps the current number.
        deterministic: use deterministic kernels on CUDA; False: use those that cuDNN measures to be the fastest.
    """
    threads_before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with _cuda_settings(device, tf32, deterministic) if device.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        if threads is not None:
            torch.set_num_threads(threads_before)


@contextlib.contextmanager
def _cuda_settings(device: torch.device, tf32: bool, deterministic: bool) -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
        matmul.allow_tf32,
        cudnn.allow_tf32,
    )
    # cuBLAS reads this variable once, when it starts, so that it can't be restored.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    cudnn.benchmark = not deterministic
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        with torch.cuda.device(device):  # unlike set_device, it accepts "cuda", the current one
            yield
    finally:
        was_deterministic, warn_only, cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32 = before
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warn_only)
