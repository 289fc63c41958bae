"""A network cut at one exit: what a deployment that always answers there really needs."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn

from exitkit.errors import UserError
from exitkit.networks.cascade import Head, MultiExitNetwork


def prune_to(network: MultiExitNetwork, exit: int) -> MultiExitNetwork:
    """Return a network with one exit that answers what exit `exit` of `network` answers, and does nothing else.

    Left out is all that this exit never reads: the later stages, the earlier heads (but for those whose output a logit
    link carries on), and fine-scale work that only later exits need. Its cost is the `pruned` column of `cost`.

    Args:
        network: any cascade whose forward `torch.fx` can trace; it is left as it is, and shares nothing with the cut.
        exit: number of the exit, from 1.

    Returns:
        a `MultiExitNetwork` of one stage, images [B, *input_shape] -> logits [B, C], whose parameters keep their names
        behind `stages.0.`, and whose `logits`, `raw` and `embeddings` are the one answer.

    Raises:
        UserError: no such exit, or a network that can't be traced.
    """
    if isinstance(exit, bool) or not isinstance(exit, int) or not 1 <= exit <= network.num_exits:
        raise UserError(f"exit is {exit!r}; expected an exit from 1 to {network.num_exits}")
    training = [module for module in network.modules() if module.training]
    network.eval()  # what asks for the mode becomes a constant of the graph; layers such as batch norm keep both modes
    try:
        graph = fx.Tracer().trace(_Answer(network, exit))
    except Exception as error:  # whatever someone's forward does with a tensor that has no values
        reason = " ".join(str(error).split())
        raise UserError(f"the network can't be cut at exit {exit}: torch.fx can't trace it ({reason})") from error
    finally:
        for module in training:
            module.training = True
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("network.")
    whole = fx.GraphModule(network, graph)
    whole.graph.eliminate_dead_code()
    stage = copy.deepcopy(fx.GraphModule(whole, whole.graph))  # takes along only what the graph still names
    head = Head(nn.Identity(), nn.Identity())
    cut = MultiExitNetwork([stage], [head], network.input_shape, network.num_classes)
    return cut.train(network.training)


class _Answer(nn.Module):
    """Runs the chain up to one exit, without taps: images -> that exit's logits."""

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
