"""A user's network as a graph: its points by name, where it can be cut, and the pieces between cuts."""

from __future__ import annotations

import copy
import functools
import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError, unknown

Shape = tuple[int, ...]

_IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}


class Value(NamedTuple):
    """What a node of the graph gives.

    Attributes:
        shape: without the batch; None for all that is no tensor with the batch as its first dimension.
        channels: the dimension of the batched tensor that holds the channels.
        cost: multiply-adds behind this node, for one image.
    """

    shape: Shape | None
    channels: int
    cost: int


class Graph:
    """A traced network.

    Points have the names that torchvision's feature extraction gives them; a prefix such as `layer2` stands for the
    last point that begins so.

    Raises:
        UserError: the network can't be traced, reads several inputs, or gives no logits [B, C].
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self.model = model
        self.title = type(model).__name__
        graph, names = self._trace()
        self.nodes = [node for node in graph.nodes if node.op not in ("output", "get_attr")]
        (self.output,) = (node for node in graph.nodes if node.op == "output")
        self.names = {node: name for node, name in names.items() if node in set(self.nodes)}
        self.place = {node: index for index, node in enumerate(self.nodes)}
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise UserError(f"{self.title} reads {len(inputs)} inputs; expected one, the images")
        self.values = _values(fx.GraphModule(model, graph), input_shape, self.title)
        answer = self.output.args[0]
        shape = self.values[answer].shape if isinstance(answer, fx.Node) else None
        if not isinstance(answer, fx.Node) or shape is None or len(shape) != 1:
            raise UserError(f"{self.title} gives no tensor [B, classes]; exits can be attached to classifiers only")
        self.answer = answer
        self.num_classes = shape[0]
        self._last_use = {
            node: max((self.place.get(user, len(self.nodes)) for user in node.users), default=-1) for node in self.nodes
        }

    def _trace(self) -> tuple[fx.Graph, dict[fx.Node, str]]:
        extraction, ops = torchvision("models.feature_extraction"), torchvision("ops")
        # The same leaves as torchvision's own, so that the points are the same.
        leaves = [kind for kind in vars(ops).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
        tracer = extraction.NodePathTracer(autowrap_modules=(math, ops), leaf_modules=leaves)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            graph = tracer.trace(self.model)
        except Exception as error:  # whatever a forward does with a tensor that has no values
            reason = " ".join(str(error).split())
            raise UserError(f"{self.title} can't be traced by torch.fx ({reason}); exits need a fixed graph") from error
        finally:
            for module in training:
                module.training = True
        return graph, dict(tracer.node_to_qualname)

    def live(self, point: fx.Node) -> list[fx.Node]:
        """Return what crosses a cut behind `point`: the point itself, then all else that is needed later."""
        here = self.place[point]
        others = [n for n in self.nodes[: here + 1] if n is not point and self._last_use[n] > here]
        return [point, *others]

    def obstacle(self, point: fx.Node) -> str:
        """Say why the graph can't be cut behind `point`, or nothing if it can."""
        here = self.place[point]
        value = self.values[point]
        if value.shape is None:
            return "it gives no tensor of one row an image"
        if not 1 <= len(value.shape) <= 3:
            return f"it gives {len(value.shape) + 1} dimensions, and a head reads 2 to 4"
        if not any(self._trains(node) for node in self.nodes[: here + 1]):
            return "nothing before it is trained"
        if not any(self._trains(node) for node in self.nodes[here + 1 :]):
            return "nothing behind it is trained"
        blocking = [node for node in self.live(point) if self.values[node].shape is None]
        if blocking:
            return f"{self.names[blocking[0]]}, which is no tensor of one row an image, is needed on both sides"
        return ""

    def _trains(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(True for _ in self.model.get_submodule(str(node.target)).parameters())
        return any(source.op == "get_attr" for source in node.all_input_nodes)

    def find(self, name: str) -> fx.Node:
        """Return the point of a name or prefix.

        Raises:
            UserError: there is none, or the graph can't be cut there; the nearest points are given.
        """
        named = [node for node, own in self.names.items() if own == name or own.startswith(f"{name}.")]
        if not named:
            raise unknown(f"point of {self.title}", name, list(self.names.values()))
        point = max(named, key=lambda node: self.place[node])
        reason = self.obstacle(point)
        if reason:
            here = self.place[point]
            possible = [node for node in self.nodes if not self.obstacle(node)]
            before = [self.names[node] for node in possible if self.place[node] < here][-1:]
            behind = [self.names[node] for node in possible if self.place[node] > here][:1]
            nearest = "no point of it can"
            if before or behind:
                several = "points are" if before and behind else "point is"
                nearest = f"the nearest {several} {' and '.join(before + behind)}"
            raise UserError(f"{self.title} can't be cut at {name}: {reason}; {nearest}")
        return point

    def clean_points(self, depth: int) -> list[fx.Node]:
        """Return the points that one tensor alone crosses, within at most `depth` unfinished modules, in order.

        Of several with nothing computed between them it is the one that leaves fewest modules unfinished, or the last.
        """
        best: dict[int, fx.Node] = {}
        for node in self._clean:
            held = best.get(self.values[node].cost)
            if self.depths[node] <= depth and (held is None or self.depths[node] <= self.depths[held]):
                best[self.values[node].cost] = node
        final = self.values[self.before_last()].cost
        return [node for cost, node in best.items() if 0 < cost < final]

    @functools.cached_property
    def _clean(self) -> list[fx.Node]:
        return [node for node in self.nodes if not self.obstacle(node) and len(self.live(node)) == 1]

    @functools.cached_property
    def depths(self) -> dict[fx.Node, int]:
        """How many modules are entered and not yet left behind each node."""
        depths = {}
        for node, following in zip(self.nodes, [*self.nodes[1:], None], strict=True):
            here = self.names[node].split(".")[:-1]
            there = self.names[following].split(".")[:-1] if following is not None else []
            depths[node] = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), len(here))
            depths[node] = min(depths[node], len(there))
        return depths

    def last_linear(self) -> nn.Linear | None:
        """Return the linear layer that gives the answer, if one does."""
        if self.answer.op != "call_module":
            return None
        module = self.model.get_submodule(str(self.answer.target))
        return module if isinstance(module, nn.Linear) else None

    def before_last(self) -> fx.Node:
        """Return what the last head begins with: the input of the last linear layer, or the answer itself."""
        if self.last_linear() is None:
            return self.answer
        before: fx.Node = self.answer.all_input_nodes[0]
        return before

    def piece(self, start: fx.Node | None, end: fx.Node, crossing: list[fx.Node]) -> fx.GraphModule:
        """Return the graph from behind `start` (None: the images) up to `end`, as a module state -> state.

        Args:
            crossing: what the state behind `end` holds, `end` first; one alone is handed on without a tuple.
        """
        given = [self.nodes[0]] if start is None else self.live(start)
        first = 0 if start is None else self.place[start]
        graph = fx.Graph()
        state = graph.placeholder("state")
        made: dict[fx.Node, fx.Node] = {}
        for index, node in enumerate(given):
            made[node] = state if len(given) == 1 else graph.call_function(operator.getitem, (state, index))
        entered = set(given)
        for node in self.nodes[first : self.place[end] + 1]:
            if node not in made:
                made[node] = graph.node_copy(node, lambda source: self._source(source, made, graph))
                self._keep_state(made[node], node, entered)
        graph.output(made[end] if len(crossing) == 1 else tuple(made[node] for node in crossing))
        graph.lint()
        return fx.GraphModule(self.model, graph)

    def _source(self, source: fx.Node, made: dict[fx.Node, fx.Node], graph: fx.Graph) -> fx.Node:
        copied: fx.Node | None = made.get(source)
        if copied is None:  # a parameter: each piece fetches its own
            copied = made[source] = graph.node_copy(source, lambda node: node)
        return copied

    def _keep_state(self, copied: fx.Node, node: fx.Node, entered: set[fx.Node]) -> None:
        """Have what reads the state make a new tensor: the exit before has read it, and its gradient needs it whole."""
        if not node.args or node.args[0] not in entered:
            return
        copied.target = _IN_PLACE.get(copied.target, copied.target)  # type: ignore[arg-type]
        if copied.kwargs.get("inplace"):
            copied.update_kwarg("inplace", False)
        if node.op == "call_method" and str(node.target).endswith("_"):
            copied.target = str(node.target).rstrip("_")
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if getattr(module, "inplace", False):
                setattr(module, "inplace", False)  # noqa: B010  which modules have it, no type tells


class _Recorder(fx.Interpreter):
    """Runs a graph, and keeps of every node the shape of what it gave, and the multiply-adds so far."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, Shape] = {}
        self.costs: dict[str, int] = {}
        self.counter = FlopCounterMode(display=False)

    def record(self, shape: Shape) -> Exception | None:
        """Run on images of `shape`; return what stopped the run, if anything did."""
        try:
            with torch.no_grad(), self.counter:
                self.run(torch.empty(shape, device="meta", dtype=_dtype(self.module)))
        except Exception as error:  # whatever a network says of an image that it does not take
            return error
        return None

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        self.costs[n.name] = self.counter.get_total_flops() // 2
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        return result


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _values(module: fx.GraphModule, input_shape: tuple[int, int, int], title: str) -> dict[fx.Node, Value]:
    ghost = copy.deepcopy(module).to("meta").eval()
    channels, height, width = input_shape
    one, several, larger = _Recorder(ghost), _Recorder(ghost), _Recorder(ghost)
    error = one.record((2, *input_shape)) or several.record((3, *input_shape))
    if error is not None:
        reason = str(error).partition("While executing")[0].strip()
        raise UserError(f"{title} does not take images of {channels}x{height}x{width}: {reason}") from error
    larger.record((2, channels, 2 * height, 2 * width))  # many networks take one size only; then nothing is learned
    values = {}
    for node in module.graph.nodes:
        shape = one.shapes.get(node.name, ())
        follows = len(shape) > 0 and several.shapes.get(node.name) == (3, *shape[1:]) and shape[0] == 2
        grown = larger.shapes.get(node.name, ())
        steady = [dim for dim, (a, b) in enumerate(zip(shape, grown, strict=False)) if dim and a == b]
        default = 2 if len(shape) == 3 else 1  # tokens have their channels last
        channels = steady[0] if len(steady) == 1 and len(grown) == len(shape) else default
        values[node] = Value(shape[1:] if follows else None, channels, one.costs[node.name] // 2)
    return values
