"""Precision: autocast, and the loss scale that fp16 needs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from exitkit.errors import UserError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""fp32; tf32 (fp32 with TensorFloat-32 products, CUDA); bf16 and fp16 autocast, the latter with loss scaling."""

AUTO = "auto"
"""bf16 if the device computes in it natively, otherwise fp32; see `choose_precision`."""

_BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names of instructions in `torch.cpu.get_capabilities`; the last is that of ARM."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the precision called `name`; `auto` is bf16 on a device with bf16 instructions, otherwise fp32."""
    if name != AUTO:
        return cast("Precision", name)
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return "bf16" if any(has.get(unit) for unit in _BF16_UNITS) else "fp32"
    return "fp32"


class Arithmetic:
    """The arithmetic of one precision on one type of device.

    Args:
        precision: see `Precision`.
        device_type: "cpu", "cuda" or "mps".

    Raises:
        UserError: tf32 on a device other than CUDA.
    """

    def __init__(self, precision: Precision, device_type: str) -> None:
        if precision == "tf32" and device_type != "cuda":
            raise UserError(
                f"precision tf32 needs a CUDA device, and the device is {device_type}; expected fp32, bf16 or fp16"
            )
        self.precision = precision
        self._device_type = device_type
        self._scaler = torch.amp.GradScaler(device_type, enabled=precision == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context of forward passes (a null context in fp32 and tf32)."""
        if self.precision not in _AUTOCAST:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=_AUTOCAST[self.precision])

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times the current loss scale (1 unless fp16)."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscaled(self, gradient: Tensor) -> Tensor:
        """Return a gradient of a scaled loss, divided by the loss scale."""
        scale = self._scaler.get_scale()
        return gradient if scale == 1 else gradient / scale

    def rescaled(self, gradient: Tensor) -> Tensor:
        """Return a gradient times the loss scale, as `step` expects it."""
        scale = self._scaler.get_scale()
        return gradient if scale == 1 else gradient * scale

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimiser with the scaled gradients in `grad`; in fp16 it is skipped if a gradient overflowed."""
        self._scaler.step(optimizer)
        self._scaler.update()

    @property
    def dtype(self) -> torch.dtype:
        """The type in which forward passes compute."""
        return _AUTOCAST.get(self.precision, torch.float32)

    @property
    def is_reduced(self) -> bool:
        """Whether forward passes compute in 16 bits."""
        return self.precision in _AUTOCAST

    @property
    def may_overflow(self) -> bool:
        """Whether the loss scale may make gradients infinite; their step is then skipped."""
        return self.precision == "fp16"

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss scale."""
        state: dict[str, Any] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the loss scale."""
        self._scaler.load_state_dict(dict(state))
