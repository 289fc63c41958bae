"""Pseudo steps of the optimiser and directional derivatives, for meta-learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.errors import UserError


class PseudoStep(NamedTuple):
    """The result of a step of SGD that is not applied.

    Attributes:
        parameters: {name: value after the step}, leaves that require gradients; parameters without a gradient are left
            out, as the optimiser does not update them.
        slopes: {name: s}, where s is the derivative of the new value with respect to the parameter's gradient.
    """

    parameters: dict[str, Tensor]
    slopes: dict[str, float]


@torch.no_grad()
def pseudo_step(
    optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None], names: Mapping[int, str]
) -> PseudoStep:
    """Return the result of a step of SGD on given gradients, with momentum and weight decay, without applying it.

    Args:
        optimizer: SGD; its state does not change.
        gradients: one per parameter, in the optimiser's order, or None.
        names: {identity of a parameter: its name}.

    Raises:
        UserError: it is another optimiser; the step of SGD is linear in the gradient.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise UserError(f"a pseudo step of {type(optimizer).__name__} is not supported; expected SGD")
    parameters: dict[str, Tensor] = {}
    slopes: dict[str, float] = {}
    pending = iter(gradients)
    for group in optimizer.param_groups:
        lr, momentum, sign = float(group["lr"]), group["momentum"], -1.0 if group["maximize"] else 1.0
        for parameter in group["params"]:
            gradient = next(pending)
            if gradient is None:
                continue
            change = sign * gradient + group["weight_decay"] * parameter
            slope = sign
            if momentum:
                buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
                kept = 1.0 if buffer is None else 1 - group["dampening"]
                rolling = kept * change + (0 if buffer is None else momentum * buffer)
                slope *= 1 + momentum * kept if group["nesterov"] else kept
                change = change + momentum * rolling if group["nesterov"] else rolling
            name = names[id(parameter)]
            parameters[name] = (parameter - lr * change).requires_grad_()
            slopes[name] = -lr * slope
    return PseudoStep(parameters, slopes)


@contextmanager
def untracked(network: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Disable updates of batch norm's running statistics inside the block, if `enabled`."""
    tracking = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for module in tracking if enabled else ():
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking if enabled else ():
            module.track_running_stats = True


def tangents(
    function: Callable[[Mapping[str, Tensor]], Sequence[Tensor]],
    point: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> list[Tensor]:
    """Return the directional derivative of each output of a function of named tensors, by one forward-mode product.

    Outputs that do not depend on the tensors have the derivative zero.
    """
    # Fused attention does not support forward mode.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = {name: forward_ad.make_dual(point[name].detach(), direction[name]) for name in point}
        outputs = [forward_ad.unpack_dual(output) for output in function(duals)]
        return [torch.zeros_like(out.primal) if out.tangent is None else out.tangent.clone() for out in outputs]
