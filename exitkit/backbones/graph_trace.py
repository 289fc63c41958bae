"""A user's network as a graph of operations, and what every operation gives, found without running on data.

The graph is torch.fx's, with the node names of `torchvision.models.feature_extraction.get_graph_node_names`. It is the
graph of evaluation; where training differs by a flag alone (functional dropout), the flag follows the network's mode.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from exitkit.data.torchvision_import import torchvision
from exitkit.errors import Note, UserError

MODE = "_training_mode"
"""The module of a traced network that tells whether it is being trained."""


class TrainingMode(nn.Module):
    """Gives its own mode, True in training: what `self.training` was before the network became a graph."""

    def forward(self) -> bool:
        """Return whether this module is in training mode."""
        return self.training


class Traced(NamedTuple):
    """A network's graph.

    Attributes:
        name: the network's class.
        graph: what it computes in evaluation, from one placeholder, the images.
        names: torchvision's name of each node that has one.
        parts: the network's own modules, parameters and tensors that the graph names.
        ghost: a copy of the network without storage.
    """

    name: str
    graph: fx.Graph
    names: dict[fx.Node, str]
    parts: dict[str, Any]
    ghost: nn.Module


class Value(NamedTuple):
    """What a node gives for two images.

    Attributes:
        kind: its type ("Tensor", "int", "Size", ...).
        shape: the tensor's shape for two images; empty for what is no tensor.
        batched: it is a tensor whose first dimension, and no other, follows the number of images.
        feature: it is batched, floating-point, and has more than that dimension.
        wide: its shape for two larger images, or None where the network takes no others.
        storage: identity of the tensor's memory (two views of one tensor have one).
        changes: memory that the node changes in place.
        macs: multiply-adds for two images.
    """

    kind: str
    shape: tuple[int, ...]
    batched: bool
    feature: bool
    wide: tuple[int, ...] | None
    storage: int
    changes: frozenset[int]
    macs: int


def trace(model: nn.Module) -> Traced:
    """Return the graph of a network that reads images alone.

    Raises:
        UserError: torch.fx can't follow its forward, or training and evaluation compute different things.
    """
    name = type(model).__name__
    try:
        # Buffers stay real: what a forward computes from them alone becomes a constant of the graph.
        memo = {id(p): _without_storage(p) for p in model.parameters()}
        ghost = copy.deepcopy(model, memo)  # type: ignore[arg-type]
        training = _trace_once(ghost.train())
        graph, names = _trace_once(ghost.eval())
    except UserError:
        raise
    except Exception as error:  # whatever someone's forward does with a tensor that has no values
        reason = " ".join(str(error).split())
        raise UserError(f"{name} can't be cut into stages: torch.fx can't trace it ({reason})") from error
    _follow_mode(name, graph, names, training[1])
    ghost.add_module(MODE, TrainingMode())
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            try:
                parts[target] = _resolve(model, target)
            except AttributeError:  # the mode, and constants that came up while tracing
                parts[target] = _resolve(ghost, target)
    return Traced(name, graph, names, parts, ghost.to("meta"))


def _without_storage(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.is_floating_point())


def _resolve(model: nn.Module, target: str) -> Any:
    found: Any = model
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _trace_once(model: nn.Module) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """Trace with torchvision's rules of what is one piece and what it is called."""
    _, *others = inspect.signature(model.forward).parameters.values() or [None]
    plain = [p for p in others if p is not None and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in plain if p.default is p.empty]
    if needed:
        raise UserError(f"{type(model).__name__} reads more than images ({', '.join(needed)}); expected one input")
    fixed = {p.name: p.default for p in plain}
    ops = torchvision("ops")
    leaves = [each for _, each in inspect.getmembers(ops, inspect.isclass) if issubclass(each, nn.Module)]
    tracer = torchvision("models.feature_extraction").NodePathTracer(autowrap_modules=(math, ops), leaf_modules=leaves)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Was not able to add assertion")
        graph = tracer.trace(model, concrete_args=fixed or None)
    for node in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if str(node.target).startswith("*") and node.users:
            raise UserError(f"{type(model).__name__} reads more than images ({node.target}); expected one input")
        _drop(graph, node)
    return graph, {node: name for node, name in tracer.node_to_qualname.items() if node.graph is graph}


def _drop(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a placeholder of fixed value together with the checks that it has this value."""
    for user in list(node.users):
        _drop(graph, user)
    graph.erase_node(node)


def _follow_mode(name: str, graph: fx.Graph, names: dict[fx.Node, str], training: dict[fx.Node, str]) -> None:
    """Let flags that are set in training alone follow the mode.

    Raises:
        UserError: training computes something else in another way.
    """
    twins = {qualified: node for node, qualified in training.items()}
    with graph.inserting_after(next(iter(graph.nodes))):
        mode = graph.call_module(MODE)
    for node, qualified in names.items():
        twin = twins.pop(qualified, None)
        if twin is None or (twin.op != node.op or twin.target != node.target and node.op != "placeholder"):
            raise UserError(
                f"{name} computes {qualified} in evaluation but not in training; expected one forward for both"
            )
        leaves, form = pytree.tree_flatten((node.args, node.kwargs))
        others, other_form = pytree.tree_flatten((twin.args, twin.kwargs))
        merged = [_merge(*pair, mode, names, training) for pair in zip(leaves, others, strict=False)]
        if form != other_form or any(
            each is Ellipsis and leaf is not Ellipsis for each, leaf in zip(merged, leaves, strict=True)
        ):
            raise UserError(f"{name} computes {qualified} otherwise in training; expected one forward for both")
        if mode in merged:
            node.args, node.kwargs = pytree.tree_unflatten(merged, form)
    if not mode.users:
        graph.erase_node(mode)
    if twins:
        few = ", ".join(list(twins)[:3])
        warnings.warn(f"{name} runs {few} in training only; the stages leave that out", Note, stacklevel=4)
