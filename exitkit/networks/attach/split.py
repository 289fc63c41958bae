"""Splitting of a traced network into stages: the possible places of cuts, and the stages."""

from __future__ import annotations

from itertools import pairwise
from operator import getitem
from typing import NamedTuple

from torch import Tensor, fx, nn

from exitkit.errors import UserError, unknown
from exitkit.escaping import counted
from exitkit.networks.attach.modes import MODE, changes_in_place
from exitkit.networks.attach.recording import as_one_node
from exitkit.networks.attach.trace import Traced
from exitkit.networks.attach.values import Value, refused_output, survey

_SIZES = ("shape", "size", "dim", "ndim", "numel", "nelement", "stride", "dtype", "device")
"""Attributes and methods of a tensor that do not depend on its values."""


def sizes_of(tensor: Tensor) -> Tensor:
    """Return a tensor [B, 0, ...] without memory, from which `of_sizes` restores a tensor's sizes [B, ...]."""
    return tensor.new_empty((tensor.shape[0], 0, *tensor.shape[1:]))


def of_sizes(sizes: Tensor) -> Tensor:
    """Return a tensor with the sizes, type and device of the tensor that `sizes_of` was given, but not its values."""
    return sizes.new_empty(()).expand(sizes.shape[0], *sizes.shape[2:])


class Plan:
    """The places at which a traced network can be cut.

    A place is the index of a node; the cut is directly after it. The tensors that cross a cut are that of its node,
    first, and all others that are computed before the cut and needed after it. What does not depend on the images'
    values does not cross: each stage computes it again (parameters, constants, masks, and sizes, which are read from
    the tensors that cross).

    Args:
        traced: the network.
        model: the network itself.
        input_shape: (channels, height, width) of an image.

    Attributes:
        places: all places at which the network can be cut, ascending.
        again: the nodes that every stage computes again.
        answer: the node of the logits.
        tail: the node of the linear layer whose output is the logits, or None.

    Raises:
        UserError: the network does not accept such images, or does not return logits.
    """

    def __init__(self, traced: Traced, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self.traced = traced
        self.values = survey(traced, model, input_shape)
        self.nodes: list[fx.Node] = list(traced.graph.nodes)
        self._position = {node: index for index, node in enumerate(self.nodes)}
        self._changed_at: dict[int, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for memory in self.values[node].changes:
                self._changed_at.setdefault(memory, []).append(index)
        self.again = self._computed_again()
        self._last_use, self._last_sizes = self._last_uses()
        trained = [user for node in self.nodes for user in self._trained_by(node)]
        self._last_trained = max(map(self._position.__getitem__, trained), default=-1)
        self._last_of: dict[str, int] = {}
        for node, name in traced.names.items():
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                self._last_of[".".join(parts[:depth])] = self._position[node]
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
        others = [node for node in self.nodes[:place] if self._last_use.get(node, -1) > place]
        return [self.nodes[place], *others]

    def shared(self, node: fx.Node) -> bool:
        """Whether a node is a tensor that is the same for all images; it crosses as one row per image."""
        return self.values[node].kind == "Tensor" and not node.meta["images"]

    def computed(self, place: int) -> list[fx.Node]:
        """Return those nodes among `crossing` that are computed from the images."""
        return [node for node in self.crossing(place) if not self.shared(node)]

    def crossing_sizes(self, place: int) -> list[fx.Node]:
        """Return the nodes of whose tensors only the sizes cross a cut."""
        tensors = self.crossing(place)
        return [node for node in self.nodes[:place] if self._last_sizes.get(node, -1) > place and node not in tensors]

    def find(self, point: str) -> int:
        """Return the place of a point: a node's name, or a module's name, meaning its last node.

        Raises:
            UserError: the point does not exist, or the network can't be cut there.
        """
        if point not in self._last_of:
            whole = [path for path in self.traced.whole if point.startswith(f"{path}.")]
            if whole and point in dict(self.traced.outline.named_modules()):
                path = whole[0]
                reason = self.traced.whole[path]
                remedy = f" (to cut inside it: {reason.remedy})" if reason.where else ""
                raise self._refusal(point, f"{path} is called as a whole, since it {reason}{remedy}", path)
            depth = point.count(".")
            raise unknown(f"point of {self.traced.name}", point, [n for n in self._last_of if n.count(".") <= depth])
        obstacle = self.obstacle(self._last_of[point])
        if obstacle is not None:
            raise self._refusal(point, obstacle, point)
        return self._last_of[point]

    def _refusal(self, point: str, reason: str, near: str) -> UserError:
        place = self._last_of.get(near, -1)
        before = [other for other in self.places if other < place][-1:]
        after = [other for other in self.places if other >= place][:1]
        names = " and ".join(self.name(other) for other in before + after)
        choices = f"the nearest possible points are {names}" if names else "no other point is possible"
        return UserError(f"{self.traced.name} can't be cut at {point}: {reason}; {choices}")

    def why_few(self) -> str:
        """Return why modules of the network can't be cut inside, for messages; empty if all can."""
        own = {path: reason for path, reason in self.traced.whole.items() if reason.where}
        shown = [f"{path} is called as a whole, since it {reason}" for path, reason in own.items()]
        more = f", and {counted(len(shown) - 2, 'more module')} likewise" if len(shown) > 2 else ""
        return "; ".join(shown[:2]) + more

    def obstacle(self, place: int) -> str | None:
        """Return why the network can't be cut at a place, or None if it can."""
        node, value = self.nodes[place], self.value(place)
        if node.op in ("placeholder", "get_attr", "output") or str(node.target).endswith(MODE):
            return "it computes nothing"
        if not value.feature:
            output = f"a tensor of shape {value.shape}" if value.kind == "Tensor" else f"no tensor ({value.kind})"
            return f"its output is {output}, not features of each image"
        if self._last_trained <= place:
            return "nothing trainable follows it"
        storages: set[int] = set()
        for other in self.crossing(place):
            crossing = self.values[other]
            name = self._described(other)
            if not crossing.batched and not self.shared(other):
                what = "no tensor" if crossing.kind != "Tensor" else f"not one row per image (shape {crossing.shape})"
                return f"{name}, which is {what}, is needed after it"
            if crossing.storage in storages and self._changed(other, place, len(self.nodes)):
                return f"{name} shares memory with another tensor, and is changed in place after it"
            storages.add(crossing.storage)
        for other in self.crossing_sizes(place):
            if not self.values[other].batched:
                return f"the size of {self._described(other)} is needed after it"
        return None

    def _described(self, node: fx.Node) -> str:
        name = self.traced.names.get(node, str(node))
        where = node.meta["where"]
        return f"{name} ({where})" if where and self.values[node].kind != "Tensor" else name

    def _trained_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that compute with the parameters of this node."""
        part = self.traced.parts.get(str(node.target))
        if isinstance(part, nn.Module):
            return [node] if next(part.parameters(), None) is not None else []
        return list(node.users) if node.op == "get_attr" and isinstance(part, nn.Parameter) else []

    def _find_answer(self) -> fx.Node:
        (output,) = self.nodes[-1].args
        name = self.traced.name
        if not isinstance(output, fx.Node):
            raise refused_output(name, output)
        value = self.values[output]
        if not value.feature or len(value.shape) != 2:
            what = f"a tensor of shape {value.shape} for two images" if value.kind == "Tensor" else f"a {value.kind}"
            raise UserError(f"{name} returns {what}; expected one tensor of logits [images, classes]")
        if value.shape[1] < 2:
            raise UserError(f"{name} returns one logit per image; expected at least 2, one per class")
        return output

    def _find_tail(self) -> fx.Node | None:
        node, calls = self.answer, [node.target for node in self.nodes if node.op == "call_module"]
        linear = node.op == "call_module" and type(self.traced.parts[str(node.target)]) is nn.Linear
        alone = len(node.users) == 1 and calls.count(node.target) == 1 and len(node.args) == 1
        features = [self.values[source] for source in node.all_input_nodes]
        return node if linear and alone and features[0].feature and len(features[0].shape) == 2 else None

    # --- what crosses a cut

    def _computed_again(self) -> set[fx.Node]:
        """Return the nodes that every stage computes again, as they do not depend on the values of the images."""
        again: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "get_attr" or str(node.target).endswith(MODE):
                again.add(node)
            elif node.op in ("call_function", "call_method") and node.users and not self._acts(node):
                independent = all(source in again for source in node.all_input_nodes)
                if independent or (_reads_sizes(node) and self.values[node].kind != "Tensor"):
                    again.add(node)
        return again

    def _acts(self, node: fx.Node) -> bool:
        """Whether a node draws random numbers, or changes memory, or its memory is changed later."""
        value = self.values[node]
        number = value.kind in ("int", "float", "bool", "Size", "tuple")
        in_place = changes_in_place(node) and not number
        return value.random or bool(value.changes) or in_place or value.storage in self._changed_at

    def counts(self, node: fx.Node) -> bool:
        """Whether a node is the number of images, which each stage reads from its state."""
        return node in self.again and self.values[node].counts

    def _last_uses(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """Return the places of the last node that needs each tensor, and of the last that needs its sizes only."""
        needs: dict[fx.Node, tuple[set[fx.Node], set[fx.Node]]] = {}
        last: dict[fx.Node, int] = {}
        last_sizes: dict[fx.Node, int] = {}
        for place, node in enumerate(self.nodes):
            tensors: set[fx.Node] = set()
            sizes: set[fx.Node] = set()
            for source in node.all_input_nodes if not self.counts(node) else ():
                if source in self.again:
                    tensors |= needs[source][0]
                    sizes |= needs[source][1]
                else:
                    (sizes if node in self.again else tensors).add(source)
            needs[node] = tensors, sizes
            if node not in self.again:
                last |= dict.fromkeys(tensors, place)
                last_sizes |= dict.fromkeys(sizes, place)
        return last, last_sizes

    def _changed(self, node: fx.Node, start: int, end: int) -> bool:
        """Whether a node after place `start`, up to `end`, changes this node's tensor in place."""
        return any(start < at <= end for at in self._changed_at.get(self.values[node].storage, ()))

    # --- stages

    def split(self, cuts: list[int]) -> list[fx.GraphModule]:
        """Return the stages between ascending places; the last one returns the logits, or the input of `tail`.

        Each stage is a module of one argument and one result: the tensor that crosses the cut, or the tuple of those,
        followed by the sizes that later stages need of other tensors. It uses the network's own modules and parameters,
        under their own names.
        """
        end = self.answer if self.tail is None else self.tail.all_input_nodes[0]
        bounds = [-1, *cuts, len(self.nodes) - 1]
        states = [State([self.nodes[0]], []), *(self._state(cut) for cut in cuts), State([end], [])]
        return [
            self._stage(start, stop, before, after)
            for (start, stop), (before, after) in zip(pairwise(bounds), pairwise(states), strict=True)
        ]

    def _state(self, place: int) -> State:
        return State(self.crossing(place), self.crossing_sizes(place))

    def _stage(self, start: int, stop: int, before: State, after: State) -> fx.GraphModule:
        stage = _StageGraph(self, before)
        for node in before.tensors:
            if self._changed(node, start, stop):
                # A head and taps also read this tensor, so that the stage has to change a copy.
                stage.env[node] = stage.graph.call_method("clone", (stage.env[node],))
            if node in after.sizes:  # the last stage that reads its values, but not the last that reads its sizes
                stage.keep_sizes(node)
        for node in [self.nodes[0], *self.nodes[start + 1 : stop + 1]]:
            if node.op not in ("placeholder", "output") and node not in self.again and node is not self.tail:
                stage.fetch(node)
            if node in after.sizes and node in stage.env:
                stage.keep_sizes(node)
        stage.finish(after)
        used = {str(node.target) for node in stage.graph.nodes if node.op in ("call_module", "get_attr")}
        parts = {target: part for target, part in self.traced.parts.items() if target in used}
        return fx.GraphModule(parts, stage.graph, class_name=f"{self.traced.name}Stage")


class State(NamedTuple):
    """What crosses a cut: tensors, and the sizes of further tensors."""

    tensors: list[fx.Node]
    sizes: list[fx.Node]


class _StageGraph:
    """The graph of one stage, while it is made.

    Attributes:
        graph: the graph.
        env: {node of the network: node of the stage}.
    """

    def __init__(self, plan: Plan, before: State) -> None:
        self._plan = plan
        self.graph = fx.Graph()
        state = self.graph.placeholder("state")
        nodes = [*before.tensors, *before.sizes]
        items = [self.graph.call_function(getitem, (state, index)) for index in range(len(nodes))]
        received = dict(zip(nodes, items if len(nodes) > 1 else [state], strict=True))
        if len(nodes) == 1:
            self.graph.erase_node(items[0])
        self._first = received[nodes[0]]
        self.env = {node: self._received(node, received[node]) for node in before.tensors}
        self._sizes = {node: received[node] for node in before.sizes}
        self._restored: dict[fx.Node, fx.Node] = {}

    def _received(self, node: fx.Node, rows: fx.Node) -> fx.Node:
        return self.graph.call_function(getitem, (rows, 0)) if self._plan.shared(node) else rows

    def _count(self) -> fx.Node:
        return self.graph.call_method("size", (self._first, 0))

    def fetch(self, node: fx.Node) -> fx.Node:
        """Return the stage's node for a node of the network, made with all that it needs."""
        if node not in self.env:
            if self._plan.counts(node):
                self.env[node] = self._count()
            else:
                self.env[node] = self.graph.node_copy(node, self._input)
        return self.env[node]

    def _input(self, node: fx.Node) -> fx.Node:
        """Return the stage's node for an input; of a tensor that is not in this stage, only the sizes are known."""
        if node in self.env or node in self._plan.again or node not in self._sizes:
            return self.fetch(node)
        if node not in self._restored:
            self._restored[node] = as_one_node(self.graph.call_function(of_sizes, (self._sizes[node],)))
        return self._restored[node]

    def keep_sizes(self, node: fx.Node) -> None:
        """Compute what later stages need of a tensor's sizes."""
        if node not in self._sizes:
            self._sizes[node] = as_one_node(self.graph.call_function(sizes_of, (self.env[node],)))

    def finish(self, after: State) -> None:
        """Return the state after the stage."""
        results = [self._sent(node) for node in after.tensors] + [self._sizes[node] for node in after.sizes]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))

    def _sent(self, node: fx.Node) -> fx.Node:
        """Return what crosses for a tensor: its rows or, if it is the same for all images, one copy per image."""
        result = self.fetch(node)
        if not self._plan.shared(node):
            return result
        kept = [-1] * len(self._plan.values[node].shape)
        return self.graph.call_method("expand", (result, self._count(), *kept))


def _reads_sizes(node: fx.Node) -> bool:
    """Whether a node reads from a tensor what does not depend on the tensor's values."""
    if node.op == "call_method":
        return node.target in _SIZES
    return node.target is len or (node.target is getattr and node.args[1] in _SIZES)
