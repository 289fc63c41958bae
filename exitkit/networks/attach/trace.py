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
from torch.fx.node import map_aggregate
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
        ghost = copy.deepcopy(model, memo)
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
    left = set(graph.nodes)
    return graph, {node: name for node, name in tracer.node_to_qualname.items() if node in left}


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
        if twin is None or twin.op != node.op or twin.target != node.target:
            raise UserError(f"{name} computes {qualified} in evaluation only; expected one forward for both modes")
        mine, theirs = _arguments(node, names), _arguments(twin, training)
        flags = [pair == (False, True) and isinstance(pair[0], bool) for pair in zip(mine, theirs, strict=False)]
        if [a for a, flag in zip(mine, flags, strict=False) if not flag] != [
            b for b, flag in zip(theirs, flags, strict=False) if not flag
        ]:
            raise UserError(f"{name} computes {qualified} otherwise in training; expected one forward for both modes")
        if any(flags):
            node.args, node.kwargs = _replace((node.args, node.kwargs), flags, mode)
    if not mode.users:
        graph.erase_node(mode)
    if twins:
        few = ", ".join(list(twins)[:3])
        warnings.warn(f"{name} runs {few} in training only; the stages leave that out", Note, stacklevel=4)


def _arguments(node: fx.Node, names: dict[fx.Node, str]) -> list[Any]:
    """Return a node's arguments, however deep in lists and slices; nodes by their names, if they have one."""
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), found.append)
    return [names.get(each, "") if isinstance(each, fx.Node) else each for each in found]


def _replace(arguments: Any, chosen: list[bool], by: fx.Node) -> Any:
    """Return arguments with the chosen ones, in the order of `_arguments`, replaced."""
    turn = iter(chosen)
    return map_aggregate(arguments, lambda each: by if next(turn) else each)


def survey(traced: Traced, input_shape: tuple[int, int, int]) -> dict[fx.Node, Value]:
    """Say what every node gives, by running the graph without storage on two, on three and on two larger images.

    Raises:
        UserError: the network does not take images of `input_shape`.
    """
    channels, height, width = input_shape
    counter = FlopCounterMode(display=False)
    runs = []
    for batch, scale in ((2, 1), (3, 1), (2, 8)):  # 8: so that maps of one pixel grow, too
        run = _Run(traced, counter)
        dtype = next((p.dtype for p in traced.ghost.parameters() if p.is_floating_point()), torch.float32)
        images = torch.empty(batch, channels, scale * height, scale * width, device="meta", dtype=dtype)
        try:
            # With gradients no operation is fused away, as attention is without.
            with torch.inference_mode(False), torch.enable_grad(), counter:
                run.run(images)
        except Exception as error:  # whatever an operation says about a size that it does not take
            if scale == 1:
                reason = " ".join(str(error).split("While executing")[0].split())
                size = "x".join(map(str, input_shape))
                raise UserError(f"{traced.name} does not take images of {size} ({reason})") from error
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
    """Runs a graph on tensors without storage and keeps what every node gave, changed in place and cost."""

    def __init__(self, traced: Traced, counter: FlopCounterMode) -> None:
        # Nothing is collected: a storage that were freed could give its identity to another.
        super().__init__(traced.ghost, garbage_collect_values=False, graph=traced.graph)
        self.counter = counter
        self.results: dict[fx.Node, Any] = {}
        self.changes: dict[fx.Node, frozenset[int]] = {}
        self.macs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; a tensor whose version rose meanwhile was changed in place."""
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
        """Fetch a parameter or constant, without its storage."""
        found = super().get_attr(target, args, kwargs)
        return found.to("meta") if isinstance(found, Tensor) else found
