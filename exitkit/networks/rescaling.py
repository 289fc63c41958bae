"""Gradient rescaling: an identity whose derivative is a given factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _RescaleCompiled(torch.autograd.Function):
    """x -> x, with the gradient multiplied by `factor`; it saves the factor only, and copies nothing.

    It has no forward-mode rule, since torch.compile does not support functions that have one.
    """

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _Rescale(_RescaleCompiled):
    """`_RescaleCompiled` with support for forward mode and vmap."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        scaled: Tensor = tangents[0] * ctx.factor
        return scaled.view_as(scaled)


class _RescaleDual(_Rescale):
    """`_Rescale` for a dual tensor outside `torch.func`.

    There the tangent of a view must be a view of the tangent, which a scaled tangent is not; so this function copies.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.clone()


def rescale(x: Tensor, factor: float) -> Tensor:
    """Return x; derivatives through it are multiplied by `factor` (IMTA, equation 4).

    Supports backward, double backward, forward mode and vmap; under torch.compile, backward only.
    """
    if factor == 1 or not x.is_floating_point():
        return x
    if torch.compiler.is_compiling():
        compiled: Tensor = _RescaleCompiled.apply(x, factor)
        return compiled
    is_dual = forward_ad.unpack_dual(x).tangent is not None
    scaled: Tensor = (_RescaleDual if is_dual else _Rescale).apply(x, factor)
    return scaled
