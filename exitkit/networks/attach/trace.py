"""A network as a torch.fx graph, and the value of every node, found without running on data.

The nodes have the names of `torchvision.models.feature_extraction.get_graph_node_names`. The graph is that of
evaluation; flags that differ in training (functional dropout) follow the network's mode.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from exitkit.data.torchvision_import import torchvision
from exitkit.errors import Note, UserError

MODE = "_training_mode"
"""Name of the module of a traced network that returns the network's mode."""


class TrainingMode(nn.Module):
    """Returns its own mode, True in training; it replaces reads of `self.training` in the traced network."""

    def forward(self) -> bool:
        """Return whether this module is in training mode."""
        return self.training


class Traced(NamedTuple):
    """A network's graph.

    Attributes:
        name: the network's class.
        graph: the computation in evaluation; its placeholder is the images.
        names: torchvision's name of each node that has one.
        parts: the network's own modules, parameters and tensors that the graph uses, by name.
        meta_copy: a copy of the network on the `meta` device.
    """

    name: str
    graph: fx.Graph
    names: dict[fx.Node, str]
    parts: dict[str, Any]
    meta_copy: nn.Module


class Value(NamedTuple):
    """The value of a node for two images.

    Attributes:
        kind: type of the value ("Tensor", "int", "Size", ...).
        shape: shape of the tensor; empty if the value is no tensor.
        batched: whether it is a tensor whose first dimension, and no other, is the number of images.
        feature: whether it is batched and floating-point, and has further dimensions.
        wide: shape for two larger images, or None if the network does not accept them.
        storage: identity of the tensor's memory; views of one tensor share it.
        changes: identities of the memory that the node changes in place.
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
    """Return the graph of a network whose only input is images.

    Raises:
        UserError: torch.fx can't trace its forward, or training and evaluation compute different functions.
    """
    name = type(model).__name__
    try:
        # Buffers keep their storage: results that depend on buffers only become constants of the graph.
        memo = {id(p): _without_storage(p) for p in model.parameters()}
        meta_copy = copy.deepcopy(model, memo)
        training = _trace_once(meta_copy.train())
        graph, names = _trace_once(meta_copy.eval())
    except UserError:
        raise
    except Exception as error:  # a user's forward may raise any error on a tensor without values
        reason = " ".join(str(error).split())
        raise UserError(f"{name} can't be cut into stages: torch.fx can't trace it ({reason})") from error
    _follow_mode(name, graph, names, training[1])
    meta_copy.add_module(MODE, TrainingMode())
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            try:
                parts[target] = _resolve(model, target)
            except AttributeError:  # the mode, and constants that tracing has made
                parts[target] = _resolve(meta_copy, target)
    return Traced(name, graph, names, parts, meta_copy.to("meta"))


def _without_storage(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.is_floating_point())


def _resolve(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _trace_once(model: nn.Module) -> tuple[fx.Graph, dict[fx.Node, str]]:
    """Return the graph and the nodes' names, with torchvision's leaf modules and names."""
    _, *others = inspect.signature(model.forward).parameters.values() or [None]
    plain = [p for p in others if p is not None and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in plain if p.default is p.empty]
    if needed:
        raise UserError(f"{type(model).__name__} has further inputs ({', '.join(needed)}); expected images only")
    fixed = {p.name: p.default for p in plain}
    ops = torchvision("ops")
    leaves = [kind for _, kind in inspect.getmembers(ops, inspect.isclass) if issubclass(kind, nn.Module)]
    tracer = torchvision("models.feature_extraction").NodePathTracer(autowrap_modules=(math, ops), leaf_modules=leaves)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Was not able to add assertion")
        graph = tracer.trace(model, concrete_args=fixed or None)
    for node in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if str(node.target).startswith("*") and node.users:
            raise UserError(f"{type(model).__name__} has further inputs ({node.target}); expected images only")
        _erase(graph, node)
    remaining = set(graph.nodes)
    return graph, {node: name for node, name in tracer.node_to_qualname.items() if node in remaining}


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a placeholder of a fixed value, and the nodes that check the value."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _follow_mode(name: str, graph: fx.Graph, names: dict[fx.Node, str], training: dict[fx.Node, str]) -> None:
    """Make the flags that differ in training follow the mode.

    Raises:
        UserError: training and evaluation differ by more than flags.
    """
    training_nodes = {qualified: node for node, qualified in training.items()}
    with graph.inserting_after(next(iter(graph.nodes))):
        mode = graph.call_module(MODE)
    for node, qualified in names.items():
        trained = training_nodes.pop(qualified, None)
        if trained is None or trained.op != node.op or trained.target != node.target:
            raise UserError(f"{name} computes {qualified} in evaluation only; expected one forward for both modes")
        arguments, training_arguments = _arguments(node, names), _arguments(trained, training)
        pairs = zip(arguments, training_arguments, strict=False)
        flags = [pair == (False, True) and isinstance(pair[0], bool) for pair in pairs]
        if [a for a, flag in zip(arguments, flags, strict=False) if not flag] != [
            b for b, flag in zip(training_arguments, flags, strict=False) if not flag
        ]:
            raise UserError(f"{name} computes {qualified} differently in training; expected one forward for both modes")
        if any(flags):
            node.args, node.kwargs = _replace((node.args, node.kwargs), flags, mode)
    if not mode.users:
        graph.erase_node(mode)
    if training_nodes:
        few = ", ".join(list(training_nodes)[:3])
        warnings.warn(f"{name} runs {few} in training only; the stages leave it out", Note, stacklevel=4)


def _arguments(node: fx.Node, names: dict[fx.Node, str]) -> list[Any]:
    """Return a node's arguments, flattened; a node among them is replaced by its name, or an empty string."""
    arguments: list[Any] = []
    map_aggregate((node.args, node.kwargs), arguments.append)
    return [names.get(argument, "") if isinstance(argument, fx.Node) else argument for argument in arguments]


def _replace(arguments: Any, chosen: list[bool], by: fx.Node) -> Any:
    """Return the arguments with the chosen ones replaced; `chosen` has the order of `_arguments`."""
    choices = iter(chosen)
    return map_aggregate(arguments, lambda argument: by if next(choices) else argument)


def survey(traced: Traced, input_shape: tuple[int, int, int]) -> dict[fx.Node, Value]:
    """Return the value of every node, by running the graph on the `meta` device on two, three and two larger images.

    Raises:
        UserError: the network does not accept images of `input_shape`.
    """
    channels, height, width = input_shape
    counter = FlopCounterMode(display=False)
    runs = []
    for batch, scale in ((2, 1), (3, 1), (2, 8)):  # 8: maps of one pixel have to grow, too
        run = _Run(traced, counter)
        dtype = next((p.dtype for p in traced.meta_copy.parameters() if p.is_floating_point()), torch.float32)
        images = torch.empty(batch, channels, scale * height, scale * width, device="meta", dtype=dtype)
        try:
            # Without gradients attention is fused, and the counter does not see it.
            with torch.inference_mode(False), torch.enable_grad(), counter:
                run.run(images)
        except Exception as error:  # an operation may raise any error for a size that it does not accept
            if scale == 1:
                reason = " ".join(str(error).split("While executing")[0].split())
                size = "x".join(map(str, input_shape))
                raise UserError(f"{traced.name} does not accept images of {size} ({reason})") from error
        runs.append(run)
    two, three, large = runs
    values = {}
    for node, result in two.results.items():
        tensor = isinstance(result, Tensor)
        shape = tuple(result.shape) if tensor else ()
        batched = tensor and _follows_batch(shape, three.results[node])
        other = large.results.get(node)
        values[node] = Value(
            kind=type(result).__name__,
            shape=shape,
            batched=batched,
            feature=batched and len(shape) > 1 and result.is_floating_point(),
            wide=tuple(other.shape) if isinstance(other, Tensor) else None,
            storage=_memory(result) if tensor else 0,
            changes=two.changes[node],
            macs=two.macs[node],
        )
    return values


def _follows_batch(shape: tuple[int, ...], three: Any) -> bool:
    return isinstance(three, Tensor) and shape[:1] == (2,) and tuple(three.shape) == (3, *shape[1:])


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Run(fx.Interpreter):
    """Runs a graph on `meta` tensors, and records each node's result, its changes in place and its multiply-adds."""

    def __init__(self, traced: Traced, counter: FlopCounterMode) -> None:
        # Values are kept: the identity of a freed storage may be used again.
        super().__init__(traced.meta_copy, garbage_collect_values=False, graph=traced.graph)
        self.counter = counter
        self.results: dict[fx.Node, Any] = {}
        self.changes: dict[fx.Node, frozenset[int]] = {}
        self.macs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; it has changed the inputs in place whose versions differ afterwards."""
        inputs = [self.env[node] for node in n.all_input_nodes]
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        self.macs[n] = (self.counter.get_total_flops() - before) // 2
        changed = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
        self.changes[n] = frozenset(map(_memory, changed))
        self.results[n] = result
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a parameter or constant, on the `meta` device."""
        value = super().get_attr(target, args, kwargs)
        return value.to("meta") if isinstance(value, Tensor) else value
