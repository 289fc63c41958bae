"""Dependence of the exits' outputs on the parameters."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.networks.cascade import MultiExitNetwork


def owners(network: MultiExitNetwork) -> dict[str, tuple[int, ...]]:
    """Return the exits whose outputs depend on each trainable parameter.

    Dependence is read from the autograd graph, so that a gradient that happens to be zero counts, and a detached path
    does not.

    Returns:
        {parameter name: exit indices, from 0}; an empty tuple for a parameter on which no exit depends.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if not named:
        return {}
    reference = named[0][1]
    x = torch.zeros(2, *network.input_shape, dtype=reference.dtype, device=reference.device)
    training = [module for module in network.modules() if module.training]
    network.eval()  # batch norm must not update its running statistics
    try:
        with torch.enable_grad():
            logits = network(x).logits
            reached: dict[str, list[int]] = {name: [] for name, _ in named}
            for index, output in enumerate(logits):
                if not output.requires_grad:  # it depends on frozen parameters only
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
    """Return the names of the trainable parameters on which no exit depends (MSDNet's last fine-scale units)."""
    return [name for name, exits in owners(network).items() if not exits]


def frozen(network: MultiExitNetwork) -> frozenset[str]:
    """Return the names of the parameters that are not trained."""
    return frozenset(name for name, parameter in network.named_parameters() if not parameter.requires_grad)


def frozen_batchnorms(network: MultiExitNetwork, fixed: Collection[str]) -> list[_BatchNorm]:
    """Return the batch-norm layers whose statistics must not change, because they belong to a frozen part.

    A layer belongs to a frozen part if its parameters are frozen; one without parameters, if those of the innermost
    module around it that has parameters are.

    Args:
        network: the network.
        fixed: names of the parameters that are frozen.
    """
    values = {id(parameter) for name, parameter in network.named_parameters() if name in fixed}
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            part, path = list(module.parameters()), name
            while not part and path:
                path = path.rpartition(".")[0]
                part = list(network.get_submodule(path).parameters())
            if all(id(parameter) in values for parameter in part):
                layers.append(module)
    return layers


def batchnorm_parameters(network: MultiExitNetwork) -> set[str]:
    """Return the names of the scale and shift parameters of all batch-norm layers."""
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
