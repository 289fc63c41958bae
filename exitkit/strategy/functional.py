"""The network with other parameters, pseudo steps of the optimiser, and directional derivatives, for meta-learning."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.errors import UserError


def call(network: nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """Return `network(*args)` with some of its parameters and buffers (by name) replaced.

    A tensor that modules share is replaced in all of them. Unlike in `torch.func.functional_call` alone, modules may
    occur several times in the network: each tensor of a module is replaced, and restored, once.
    """
    if not tensors:
        return network(*args)
    names = defaultdict[int, list[str]](list)  # of each tensor, one for every module that holds it
    for path, module in network.named_modules():
        # Scripted modules have mappings without the operator |.
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            names[id(tensor)].append(f"{path}.{name}".lstrip("."))
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    replaced = {name: tensor for key, tensor in tensors.items() for name in names[id(own[key])]}
    return torch.func.functional_call(network, replaced, args, tie_weights=False)


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
        gradients: one per parameter that is not frozen, in the optimiser's order, or None.
        names: {identity of a parameter: its name}.

    Raises:
        UserError: it is another optimiser; the step of SGD is linear in the gradient.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        name = type(optimizer).__name__
        raise UserError(
            f"the method computes steps of the optimiser in advance, which {name} does not allow; expected SGD"
        )
    parameters: dict[str, Tensor] = {}
    slopes: dict[str, float] = {}
    pending = iter(gradients)
    for group in optimizer.param_groups:
        lr, momentum, sign = float(group["lr"]), group["momentum"], -1.0 if group["maximize"] else 1.0
        for parameter in trained_in(group):
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


def trained_in(group: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return the parameters of an optimiser's group that are not frozen."""
    return [parameter for parameter in group["params"] if parameter.requires_grad]


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

    Raises:
        UserError: torch has no forward-mode derivative of an operation.
    """
    # Fused attention does not support forward mode.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = {name: forward_ad.make_dual(point[name].detach(), direction[name]) for name in point}
        try:
            outputs = [forward_ad.unpack_dual(output) for output in function(duals)]
        except NotImplementedError as error:
            operation = re.search(r"forward AD with (\w+)", str(error))
            raise UserError(
                f"torch has no forward-mode derivative of {operation[1] if operation else 'an operation'}, which the "
                "method needs; expected a network without it, such as one without weight or spectral norm "
                "(torch.nn.utils.parametrize.remove_parametrizations), or another method"
            ) from None
        return [torch.zeros_like(out.primal) if out.tangent is None else out.tangent.clone() for out in outputs]
