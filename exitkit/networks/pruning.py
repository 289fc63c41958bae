"""Pruning of a network to one exit, for deployments that always use that exit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import getitem
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from exitkit.errors import UserError
from exitkit.networks.attach.values import NodeRun, run_nodes
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.networks.copying import copied
from exitkit.networks.inputs import check_cascade


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
    check_cascade(network)
    if isinstance(exit, bool) or not isinstance(exit, int) or not 1 <= exit <= network.num_exits:
        raise UserError(f"exit is {exit!r}; expected an exit from 1 to {network.num_exits}")
    training = [module for module in network.modules() if module.training]
    network.eval()  # reads of `training` become constants of the graph; batch norm and the like keep both modes
    try:
        graph = _Tracer().trace(_UpToExit(network, exit))
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
    _remove_unneeded(traced.graph, run_nodes(traced, traced.graph, network.input_shape))
    stage = copied(fx.GraphModule(traced, traced.graph))  # copies only what the graph uses
    head = Head(nn.Identity(), nn.Identity())
    pruned = MultiExitNetwork([stage], [head], network.input_shape, network.num_classes)
    return pruned.train(network.training)


class _Tracer(fx.Tracer):
    """Traces a network; the graphs of the stages of an attached network are copied."""

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call of a module."""
        if not isinstance(m, fx.GraphModule):
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        env: dict[fx.Node, Any] = {}
        for node in m.graph.nodes:
            if node.op == "placeholder":
                env[node] = pytree.tree_map_only(fx.Proxy, lambda proxy: proxy.node, args[0])
            elif node.op == "output":
                break
            elif node.target is getitem and isinstance(env.get(node.args[0]), tuple):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self.graph.node_copy(node, env.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    env[node].target = f"{path}.{node.target}"
        return pytree.tree_map_only(fx.Node, lambda result: self.proxy(env[result]), node.args[0])


def _remove_unneeded(graph: fx.Graph, run: NodeRun) -> None:
    """Remove the nodes that the output does not depend on, by their values or by what they change in place."""
    needed: set[fx.Node] = set()
    read: set[int] = set()
    for node in reversed(graph.nodes):
        used = node.op in ("placeholder", "output") or any(user in needed for user in node.users)
        if used or run.changes(node) & read:
            needed.add(node)
            read |= run.reads[node]
    for node in reversed(graph.nodes):
        if node not in needed:
            graph.erase_node(node)


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
