"""Pruning of a network to one exit, for deployments that always use that exit."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn

from exitkit.errors import UserError
from exitkit.networks.cascade import Head, MultiExitNetwork


def prune_to(network: MultiExitNetwork, exit: int) -> MultiExitNetwork:
    """Return a network with one exit, whose predictions are those of exit `exit` of `network`.

    Operations that this exit does not depend on are removed: the later stages, the earlier heads (unless a logit link
    uses their output), and fine-scale operations for later exits. Its cost is the `pruned` column of `cost`.

    Args:
        network: any cascade whose forward `torch.fx` can trace; it does not change, and shares no tensors with the
            result.
        exit: number of the exit, from 1.

    Returns:
        a `MultiExitNetwork` of one stage, images [B, *input_shape] -> logits [B, C]. The names of its parameters are
        prefixed by `stages.0.`; its `logits`, `raw` and `embeddings` are the same tensor.

    Raises:
        UserError: the network has no such exit, or can't be traced.
    """
    if isinstance(exit, bool) or not isinstance(exit, int) or not 1 <= exit <= network.num_exits:
        raise UserError(f"exit is {exit!r}; expected an exit from 1 to {network.num_exits}")
    training = [module for module in network.modules() if module.training]
    network.eval()  # reads of `training` become constants of the graph; batch norm and the like keep both modes
    try:
        graph = fx.Tracer().trace(_UpToExit(network, exit))
    except Exception as error:  # a user's forward may raise any error on a tensor without values
        reason = " ".join(str(error).split())
        raise UserError(f"the network can't be cut at exit {exit}: torch.fx can't trace it ({reason})") from error
    finally:
        for module in training:
            module.training = True
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("network.")
    traced = fx.GraphModule(network, graph)
    traced.graph.eliminate_dead_code()
    stage = copy.deepcopy(fx.GraphModule(traced, traced.graph))  # copies only what the graph uses
    head = Head(nn.Identity(), nn.Identity())
    pruned = MultiExitNetwork([stage], [head], network.input_shape, network.num_classes)
    return pruned.train(network.training)


class _UpToExit(nn.Module):
    """Runs the network up to one exit, without taps: images -> the logits of that exit."""

    def __init__(self, network: MultiExitNetwork, exit: int) -> None:
        super().__init__()
        self.network = copy.copy(network)
        self.network.taps = []
        self.exit = exit

    def forward(self, x: Tensor) -> Any:
        state, carry = x, None
        for index in range(self.exit):
            output, state, carry = self.network.step(index, state, carry)
        return output.logits
