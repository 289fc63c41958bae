"""One graph for training and evaluation, from the graphs of both.

The graph is that of evaluation. Constants that differ in training (the flag of a functional dropout, or its rate)
follow the mode of the module whose forward uses them. All other differences are found: the module whose forward makes
them has to be called as a whole.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from exitkit.networks.attach.recording import Reason, Recorder, as_one_node, choose, in_place, set_item

MODE = "_training_mode"
"""Name of the modules, one per module of the network at most, that return the mode of that module."""


class TrainingMode(nn.Module):
    """Returns its own mode, True in training; it replaces reads of `self.training` in the recorded network."""

    def forward(self) -> bool:
        """Return whether this module is in training mode."""
        return self.training


class _Key(str):
    """The key of a node that is an argument of another."""


class Merge:
    """Makes the graph of evaluation follow the mode.

    Args:
        training, evaluation: the recordings.
        training_graph, graph: their graphs; the second is changed.

    Attributes:
        found: the modules whose forward differs in training otherwise than by constants, and how.
        left_out: names of the nodes that run in training only, and have no effect on the nodes of both modes.
    """

    def __init__(self, training: Recorder, training_graph: fx.Graph, evaluation: Recorder, graph: fx.Graph) -> None:
        self.found: dict[str, Reason] = {}
        self.left_out: list[str] = []
        self._graph = graph
        self._names = training.names | evaluation.names
        self._both = training.ran & evaluation.ran
        self._trained: dict[str, fx.Node] = {node.meta["key"]: node for node in training_graph.nodes}
        self._evaluated: dict[str, fx.Node] = {node.meta["key"]: node for node in graph.nodes}
        for key, node in self._evaluated.items():
            if not self.found:
                self._compare(node, self._trained.get(key))
        if not self.found:
            self._check_training_only()

    def _differs(self, node: fx.Node, how: str) -> None:
        """Add the module whose forward decides whether this node runs."""
        path = str(node.meta["path"])
        while path and path not in self._both:
            path = path.rpartition(".")[0]
        self.found.setdefault(path, Reason(f"computes {self._names.get(node, node)} {how}", node.meta["where"]))

    def _compare(self, node: fx.Node, other: fx.Node | None) -> None:
        if other is None or other.target != node.target:
            self._differs(node, "in evaluation only")
        elif node.op == "output":
            self._compare_outputs(node, other)
        else:
            self._compare_arguments(node, other)

    def _compare_outputs(self, node: fx.Node, other: fx.Node) -> None:
        """Compare what the network returns: in training, it may return more, such as auxiliary logits."""
        result, training_result = node.args[0], other.args[0]
        if not isinstance(result, fx.Node):
            return  # refused later, as it is no tensor of logits
        alone = isinstance(training_result, fx.Node)
        if isinstance(training_result, fx.Node) and isinstance(training_result.target, type):  # a named tuple
            other, alone = training_result, False
        if result.meta["key"] in _arguments(other):
            return
        if alone and isinstance(training_result, fx.Node):
            self._differs(training_result, "in training only")
        else:
            self._differs(result, "in evaluation only")

    def _compare_arguments(self, node: fx.Node, other: fx.Node) -> None:
        arguments, training_arguments = _arguments(node), _arguments(other)
        if len(arguments) != len(training_arguments):
            self._differs(node, "differently in training")
            return
        choices: list[fx.Node | None] = []
        for argument, training_argument in zip(arguments, training_arguments, strict=True):
            keys = [a for a in (argument, training_argument) if isinstance(a, _Key)]
            same = type(argument) is type(training_argument) and argument == training_argument
            if keys and not same:
                self._blame(node, keys)
                return
            choices.append(None if same else self._choice(node, argument, training_argument))
        if any(choice is not None for choice in choices):
            remaining = iter(choices)
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs), lambda argument: next(remaining) or argument
            )

    def _blame(self, node: fx.Node, keys: list[_Key]) -> None:
        """Add the module that makes an argument of one mode only or, if there is none, that of the node itself."""
        one_sided = [key for key in keys if (key in self._trained) != (key in self._evaluated)]
        if not one_sided:
            self._differs(node, "differently in training")
            return
        key = one_sided[-1]
        source = self._trained.get(key) or self._evaluated[key]
        self._differs(source, "in training only" if key in self._trained else "in evaluation only")

    def _choice(self, node: fx.Node, constant: Any, training_constant: Any) -> fx.Node:
        """Return a node before `node` whose value is the constant of the mode."""
        with self._graph.inserting_before(node):
            mode = self._graph.call_module(f"{node.meta['path']}.{MODE}".lstrip("."))
            mode.meta = node.meta | {"images": False, "live": False, "key": ""}
            if constant is False and training_constant is True:
                return mode
            choice = self._graph.call_function(choose, ((constant, training_constant), mode))
            choice.meta = dict(mode.meta)
            return as_one_node(choice)

    def _check_training_only(self) -> None:
        extra = [node for key, node in self._trained.items() if key not in self._evaluated]
        for node in extra:
            if changes_in_place(node) and _source(node).meta["key"] in self._evaluated:
                self._differs(node, "in training only")
        self.left_out = [self._names.get(node, str(node)) for node in extra if node.op.startswith("call_")]


def _arguments(node: fx.Node) -> list[Any]:
    """Return a node's arguments, flattened; a node among them is replaced by its key."""
    arguments: list[Any] = []
    map_aggregate((node.args, node.kwargs), arguments.append)
    return [_Key(argument.meta["key"]) if isinstance(argument, fx.Node) else argument for argument in arguments]


def changes_in_place(node: fx.Node) -> bool:
    """Whether an operation changes one of its inputs, by the conventions of torch."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if node.target in (in_place, set_item) or (name.endswith("_") and not name.endswith("__")):
        return True
    return node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None


def _source(node: fx.Node) -> fx.Node:
    """Return the node that made the memory of a node's result, as far as the names of operations tell."""
    while changes_in_place(node) or node.target in _VIEWS:
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            break
        node = first
    return node


_VIEWS: set[Any] = {getitem, getattr, torch.flatten, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze}
_VIEWS |= {torch.reshape, torch.narrow, torch.select, torch.chunk, torch.split}
_VIEWS |= {"view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "narrow", "select", "expand"}
_VIEWS |= {"detach", "contiguous", "to", "t", "view_as", "unflatten", "chunk", "split"}
