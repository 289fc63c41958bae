"""Splitting of a traced network into stages: the possible places of cuts, and the stages."""

from __future__ import annotations

from itertools import pairwise
from operator import getitem

from torch import fx, nn

from exitkit.errors import UserError, unknown
from exitkit.networks.attach.trace import MODE, Traced, Value, survey


class Plan:
    """The places at which a traced network can be cut.

    A place is the index of a node; the cut is directly after it. The tensors that cross a cut are that of its node,
    first, and all others that are computed before the cut and needed after it. Parameters and constants do not cross:
    each stage that needs them fetches them.

    Args:
        traced: the network.
        input_shape: (channels, height, width) of an image.

    Attributes:
        places: all places at which the network can be cut, ascending.
        answer: the node of the logits.
        tail: the node of the linear layer whose output is the logits, or None.

    Raises:
        UserError: the network does not accept such images, or does not return logits.
    """

    def __init__(self, traced: Traced, input_shape: tuple[int, int, int]) -> None:
        self.traced = traced
        self.values = survey(traced, input_shape)
        self.nodes: list[fx.Node] = list(traced.graph.nodes)
        position = {node: index for index, node in enumerate(self.nodes)}
        self._last_use = [max((position[user] for user in node.users), default=-1) for node in self.nodes]
        self._last_trained = max((position[user] for node in self.nodes for user in self._trained_by(node)), default=-1)
        self._changed_at: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for memory in self.values[node].changes:
                self._changed_at.setdefault(memory, []).append(index)
        self._last_of: dict[str, int] = {}
        for node, name in traced.names.items():
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                self._last_of[".".join(parts[:depth])] = position[node]
        self._crossing = self._sweep()
        self.answer = self._find_answer()
        self.tail = self._find_tail()
        self.places = [place for place in range(len(self.nodes)) if self.obstacle(place) is None]

    def value(self, place: int) -> Value:
        """Return the value of the node at a place."""
        return self.values[self.nodes[place]]

    def name(self, place: int) -> str:
        """Return the shortest name of a place: `layer1` for the last node of layer1."""
        names = [name for name, last in self._last_of.items() if last == place]
        return min(names, key=lambda name: name.count(".")) if names else str(self.nodes[place])

    def crossing(self, place: int) -> list[fx.Node]:
        """Return the nodes whose tensors cross a cut: the node at the place, then the others in order."""
        return self._crossing[place]

    def find(self, point: str) -> int:
        """Return the place of a point: a node's name, or a module's name, meaning its last node.

        Raises:
            UserError: the point does not exist, or the network can't be cut there.
        """
        if point not in self._last_of:
            depth = point.count(".")
            raise unknown(f"point of {self.traced.name}", point, [n for n in self._last_of if n.count(".") <= depth])
        place = self._last_of[point]
        reason = self.obstacle(place)
        if reason is None:
            return place
        before = [other for other in self.places if other < place][-1:]
        after = [other for other in self.places if other > place][:1]
        near = " and ".join(self.name(other) for other in before + after)
        choices = f"the nearest possible points are {near}" if near else "no other point is possible"
        raise UserError(f"{self.traced.name} can't be cut at {point}: {reason}; {choices}")

    def obstacle(self, place: int) -> str | None:
        """Return why the network can't be cut at a place, or None if it can."""
        node, value = self.nodes[place], self.value(place)
        if node.op in ("placeholder", "get_attr", "output") or node.target == MODE:
            return "it computes nothing"
        if not value.feature:
            output = f"a tensor of shape {value.shape}" if value.kind == "Tensor" else f"no tensor ({value.kind})"
            return f"its output is {output}, not features of each image"
        if self._last_trained <= place:
            return "nothing trainable follows it"
        storages: set[int] = set()
        for other in self.crossing(place):
            crossing = self.values[other]
            name = self.traced.names.get(other, str(other))
            if not crossing.batched:
                what = "no tensor" if crossing.kind != "Tensor" else f"not one row per image (shape {crossing.shape})"
                return f"{name}, which is {what}, is needed after it"
            if crossing.storage in storages and self._changed(other, place, len(self.nodes)):
                return f"{name} shares memory with another tensor, and is changed in place after it"
            storages.add(crossing.storage)
        return None

    def _trained_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that compute with the parameters of this node."""
        part = self.traced.parts.get(str(node.target))
        if isinstance(part, nn.Module):
            return [node] if next(part.parameters(), None) is not None else []
        return list(node.users) if node.op == "get_attr" and isinstance(part, nn.Parameter) else []

    def _find_answer(self) -> fx.Node:
        (output,) = self.nodes[-1].args
        value = self.values[output] if isinstance(output, fx.Node) else self.values[self.nodes[-1]]
        if not isinstance(output, fx.Node) or not value.feature or len(value.shape) != 2:
            what = f"a tensor of shape {value.shape} for two images" if value.kind == "Tensor" else f"a {value.kind}"
            raise UserError(f"{self.traced.name} returns {what}; expected one tensor of logits [images, classes]")
        return output

    def _find_tail(self) -> fx.Node | None:
        node, calls = self.answer, [node.target for node in self.nodes if node.op == "call_module"]
        linear = node.op == "call_module" and type(self.traced.parts[str(node.target)]) is nn.Linear
        alone = len(node.users) == 1 and calls.count(node.target) == 1 and len(node.args) == 1
        features = [self.values[source] for source in node.all_input_nodes]
        return node if linear and alone and features[0].feature and len(features[0].shape) == 2 else None

    def _sweep(self) -> list[list[fx.Node]]:
        """Return, per place, the nodes whose tensors cross a cut there."""
        needed: list[int] = []
        crossing = []
        for place, node in enumerate(self.nodes):
            needed = [index for index in needed if self._last_use[index] > place]
            crossing.append([node, *(self.nodes[index] for index in needed)])
            if not _fetched(node):
                needed.append(place)
        return crossing

    def _changed(self, node: fx.Node, start: int, end: int) -> bool:
        """Whether a node after place `start`, up to `end`, changes this node's tensor in place."""
        return any(start < at <= end for at in self._changed_at.get(self.values[node].storage, ()))

    def split(self, cuts: list[int]) -> list[fx.GraphModule]:
        """Return the stages between ascending places; the last one returns the logits, or the input of `tail`.

        Each stage is a module of one argument and one result: the tensor that crosses the cut, or the tuple of those.
        It uses the network's own modules and parameters, under their own names.
        """
        end = self.answer if self.tail is None else self.tail.all_input_nodes[0]
        bounds = [-1, *cuts, len(self.nodes) - 1]
        states = [[self.nodes[0]], *(self.crossing(cut) for cut in cuts), [end]]
        return [
            self._stage(start, stop, inputs, outputs)
            for (start, stop), (inputs, outputs) in zip(pairwise(bounds), pairwise(states), strict=True)
        ]

    def _stage(self, start: int, stop: int, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        state = graph.placeholder("state")
        env: dict[fx.Node, fx.Node] = {}
        for index, node in enumerate(inputs):
            env[node] = graph.call_function(getitem, (state, index)) if len(inputs) > 1 else state
        for node in inputs:
            if self._changed(node, start, stop):
                # A head and taps also read this tensor, so that the stage has to change a copy.
                env[node] = graph.call_method("clone", (env[node],))

        def fetch(node: fx.Node) -> fx.Node:
            if node not in env:
                env[node] = graph.node_copy(node, fetch)
            return env[node]

        for node in self.nodes[start + 1 : stop + 1]:
            skipped = node.op in ("placeholder", "output") or _fetched(node) or (self.tail is node)
            if not skipped:
                fetch(node)
        results = [fetch(node) for node in outputs]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        parts = {
            node.target: self.traced.parts[node.target] for node in graph.nodes if node.target in self.traced.parts
        }
        return fx.GraphModule(parts, graph, class_name=f"{self.traced.name}Stage")


def _fetched(node: fx.Node) -> bool:
    """Whether each stage fetches this node's value itself."""
    return node.op == "get_attr" or node.target == MODE
