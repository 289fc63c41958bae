"""Folding of a trained network for inference: batch normalisation becomes part of the convolution before it.

    gamma (conv(x) - mean) / sqrt(variance + eps) + beta  =  conv'(x)

In evaluation mode batch normalisation is an affine function per channel, so that the convolution or linear layer
before it can do its work with other weights. The outputs differ from the network's in the last digits only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from exitkit.engine.batchnorm import SyncedBatchNorm
from exitkit.engine.fused import FusedBatchNorm, is_hooked
from exitkit.networks.cascade import MultiExitNetwork, Units
from exitkit.networks.copying import copied

_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d, nn.Linear: nn.BatchNorm1d}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""Layers that do nothing in evaluation mode."""
_RELUS = (torch.relu, torch.relu_, torch.nn.functional.relu, "relu", "relu_")
"""Functions and methods that are a ReLU, as torch.fx records them."""


class ConvReLU(nn.Module):
    """A 2-d convolution followed by ReLU, which overwrites the convolution's output: one call, one tensor.

    Args:
        conv: the convolution, with zero padding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(conv(x))."""
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups).relu_()


def fold(network: MultiExitNetwork) -> MultiExitNetwork:
    """Return a copy of a network for inference, with every batch normalisation folded that follows a convolution.

    Chains of layers (`nn.Sequential`) and traced stages (of `attach_exits` and `prune_to`) are folded; a module with
    a forward of its own is searched for such chains and otherwise remains as it is, and so does one with forward hooks.
    Dropout is removed.

    Args:
        network: any cascade; it does not change, and shares no tensors with the result.

    Returns:
        the copy, in evaluation mode, without gradient taps, gradients and kept features; the names of its parameters
        differ from the network's.
    """
    folded = copied(network).eval().requires_grad_(False)
    folded.taps, folded.keep_features = [], False
    for parent in list(folded.modules()):
        for name, child in parent.named_children():
            if _is_chain(child):
                setattr(parent, name, _chain(child))
        if isinstance(parent, fx.GraphModule):
            _fold_graph(parent)
    return folded


def _is_chain(module: nn.Module) -> bool:
    """Whether a module does nothing but call its children in order."""
    return type(module).forward in (nn.Sequential.forward, Units.forward) and not is_hooked(module)


def _does_nothing(layer: nn.Module | None) -> bool:
    return type(layer) in _NOTHING and not is_hooked(layer)


def _layers(chain: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a chain that do something, with those of inner chains in their place."""
    for layer in chain.children():
        if _is_chain(layer):
            yield from _layers(layer)
        elif not _does_nothing(layer):
            yield layer


def _chain(chain: nn.Module) -> nn.Module:
    folded: list[nn.Module] = []
    for layer in _layers(chain):
        joined = _joined(folded[-1], layer) if folded else None
        folded[-1:] = [*folded[-1:], layer] if joined is None else [joined]
    return folded[0] if len(folded) == 1 else nn.Sequential(*folded)


def _joined(first: nn.Module | None, second: nn.Module | None) -> nn.Module | None:
    """Return one layer that does the work of two, or None if there is none."""
    if is_hooked(first, second):
        return None
    if type(second) is nn.ReLU and type(first) is nn.Conv2d and first.padding_mode == "zeros":
        return ConvReLU(first)
    norm = _NORMS.get(type(first))  # the exact type: a subclass may compute something else
    if norm is None or type(second) not in (norm, FusedBatchNorm, SyncedBatchNorm):
        return None
    plain: Any = second
    if plain.running_mean is None:
        return None
    fuse: Any = fuse_linear_bn_eval if type(first) is nn.Linear else fuse_conv_bn_eval
    joined: nn.Module = fuse(first, plain).requires_grad_(False)
    if getattr(plain, "relu", False):  # a FusedBatchNorm
        relu = _joined(joined, nn.ReLU())
        return relu or nn.Sequential(joined, nn.ReLU())
    return joined


def _fold_graph(traced: fx.GraphModule) -> None:
    """Join the layers of a traced module in place."""
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node):
            continue
        layer = _layer(traced, node)
        joined = _joined(_layer(traced, before), layer) if len(before.users) == 1 else None
        if joined is not None:
            # A flat name: the code of a traced module looks up every part of a nested name at each call.
            before.target = f"joined_{before.name}"
            traced.add_module(before.target, joined)
        if joined is not None or _does_nothing(layer):
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()


def _layer(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the layer that a node calls; None if it is none."""
    if node.op == "call_module":
        return traced.get_submodule(str(node.target))
    return nn.ReLU() if node.target in _RELUS else None
