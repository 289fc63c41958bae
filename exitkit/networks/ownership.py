"""Which exits read which parameter."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.networks.cascade import MultiExitNetwork


def owners(network: MultiExitNetwork) -> dict[str, tuple[int, ...]]:
    """Say which exits' outputs depend on each trainable parameter.

    Returns {parameter name: indices of the exits whose output reads it}; an empty tuple for a parameter that no exit
    reads. Dependence is asked of the graph, so that a gradient which happens to be zero still counts, and a detached
    one does not.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if not named:
        return {}
    reference = named[0][1]
    x = torch.zeros(2, *network.input_shape, dtype=reference.dtype, device=reference.device)
    training = [module for module in network.modules() if module.training]
    network.eval()  # batch norm must not move its statistics
    try:
        with torch.enable_grad():
            logits = network(x).logits
            reached: dict[str, list[int]] = {name: [] for name, _ in named}
            for index, output in enumerate(logits):
                if not output.requires_grad:  # all that it reads is frozen
                    continue
                grads = torch.autograd.grad(output.sum(), [p for _, p in named], retain_graph=True, allow_unused=True)
                for (name, _), grad in zip(named, grads, strict=True):
                    if grad is not None:
                        reached[name].append(index)
    finally:
        for module in training:
            module.training = True
    return {name: tuple(exits) for name, exits in reached.items()}


def unreached(network: MultiExitNetwork) -> list[str]:
    """Return the names of the parameters that no exit reads (MSDNet's last fine-scale units)."""
    return [name for name, exits in owners(network).items() if not exits]


def batchnorm_parameters(network: MultiExitNetwork) -> set[str]:
    """Return the names of the scales and shifts of all batch normalisations."""
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
