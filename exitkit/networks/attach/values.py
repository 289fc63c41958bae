"""The value of every node of a traced network: its shape, what it changes, and its cost.

The graph runs on the `meta` device, where tensors have shapes but no values. Parts that need values (control flow that
depends on the images) make it run on a copy of the network and random images instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from exitkit.engine.randomness import seeded_everywhere
from exitkit.errors import UserError
from exitkit.networks.attach.trace import Traced
from exitkit.networks.compilation import eagerly_counted
from exitkit.networks.copying import copied
from exitkit.networks.inputs import reference_tensor


class Value(NamedTuple):
    """The value of a node for two images.

    Attributes:
        kind: type of the value ("Tensor", "int", "Size", ...).
        shape: shape of the tensor; empty if the value is no tensor.
        batched: whether it is a tensor whose first dimension, and no other, is the number of images.
        counts: whether it is the number of images.
        feature: whether it is batched and floating-point, and has further dimensions.
        wide: shape for two larger images, or None if the network does not accept them.
        storage: identity of the tensor's memory; views of one tensor share it.
        changes: identities of the memory that the node changes in place.
        random: whether the node draws random numbers.
        macs: multiply-adds for two images.
    """

    kind: str
    shape: tuple[int, ...]
    batched: bool
    counts: bool
    feature: bool
    wide: tuple[int, ...] | None
    storage: int
    changes: frozenset[int]
    random: bool
    macs: int


def survey(traced: Traced, model: nn.Module, input_shape: tuple[int, int, int]) -> dict[fx.Node, Value]:
    """Return the value of every node, by running the graph on two, three and two larger images.

    Args:
        traced: the network.
        model: the network itself, for a run with values if there is no run without.
        input_shape: (channels, height, width) of an image.

    Raises:
        UserError: the network does not accept images of `input_shape`.
    """
    try:
        two, three = (NodeRun(traced.outline, traced.graph).on(batch, input_shape) for batch in (2, 3))
    except Exception as error:  # an operation may raise any error for a size that it does not accept
        if any(parameter.is_meta for parameter in model.parameters()):
            raise refused_images(traced.name, input_shape, error) from error
        two, three = _with_values(traced, model, input_shape)
    try:
        channels, height, width = input_shape  # 8: maps of one pixel have to grow, too
        large = NodeRun(traced.outline, traced.graph).on(2, (channels, 8 * height, 8 * width)).results
    except Exception:
        large = {}
    return {node: _value(node, two, three, large.get(node)) for node in two.results}


def _with_values(traced: Traced, model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[NodeRun, NodeRun]:
    runs = []
    for batch in (2, 3):
        try:
            runs.append(NodeRun(traced.with_values(model), traced.graph).on(batch, input_shape))
        except Exception as error:  # a user's forward may raise any error
            raise refused_images(traced.name, input_shape, error) from error
    return runs[0], runs[1]


def refused_images(name: str, input_shape: tuple[int, int, int], error: Exception) -> UserError:
    """Return the error for images that a network does not accept."""
    reason = " ".join(str(error).split("While executing")[0].split())
    return UserError(f"{name} does not accept images of {'x'.join(map(str, input_shape))} ({reason})")


def refused_output(name: str, output: Any) -> UserError:
    """Return the error for a network whose result is no tensor.

    Args:
        name: the network's class.
        output: the result, or the nodes in its place.
    """
    if isinstance(output, dict):
        what = f"a dict with the keys {', '.join(map(str, output))}"
        remedy = "wrap it in a module that returns one of them"
    elif isinstance(output, list | tuple):
        what = "a tuple" if isinstance(output, tuple) else "a list"
        remedy = "wrap it in a module that returns one of them"
    else:
        what, remedy = f"a {type(output).__name__}", "wrap it in a module that returns the tensor"
    return UserError(f"{name} returns {what}; expected one tensor of logits [images, classes]: {remedy}")


def _value(node: fx.Node, two: NodeRun, three: NodeRun, large: Any) -> Value:
    result, more = two.results[node], three.results[node]
    tensor = isinstance(result, Tensor)
    shape = tuple(result.shape) if tensor else ()
    batched = tensor and isinstance(more, Tensor) and shape[:1] == (2,) and tuple(more.shape) == (3, *shape[1:])
    return Value(
        kind=type(result).__name__,
        shape=shape,
        batched=batched,
        counts=isinstance(result, int) and (result, more) == (2, 3),
        feature=batched and len(shape) > 1 and result.is_floating_point(),
        wide=tuple(large.shape) if isinstance(large, Tensor) else None,
        storage=_memory(result) if tensor else 0,
        changes=two.changes(node),
        random=node in two.watch.random,
        macs=two.macs[node],
    )


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Records which nodes change memory in place, and which draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.node: fx.Node | None = None
        self.changes: dict[fx.Node, frozenset[int]] = {}
        self.random: set[fx.Node] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.node is not None and torch.Tag.nondeterministic_seeded in func.tags:
            self.random.add(self.node)
        if self.node is not None and func._schema.is_mutable:
            written = [
                args[index] if index < len(args) else kwargs.get(argument.name)
                for index, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            memory = frozenset(_memory(leaf) for leaf in pytree.tree_leaves(written) if isinstance(leaf, Tensor))
            self.changes[self.node] = self.changes.get(self.node, frozenset()) | memory
        return func(*args, **kwargs)


class NodeRun(fx.Interpreter):
    """Runs a graph once, and records what each node does.

    Args:
        module: the module that the graph belongs to, on the `meta` device or with values.
        graph: the graph.

    Attributes:
        results: the value of each node.
        reads: identities of the memory of each node's inputs.
        macs: multiply-adds of each node.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        # Values are kept: the identity of freed memory may be used again.
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.counter = FlopCounterMode(display=False)
        self.watch = _Watch()
        self.results: dict[fx.Node, Any] = {}
        self.reads: dict[fx.Node, frozenset[int]] = {}
        self.macs: dict[fx.Node, int] = {}
        reference = reference_tensor(module)
        self._device, self._dtype = reference.device, reference.dtype

    def on(self, batch: int, shape: tuple[int, int, int]) -> NodeRun:
        """Run on random images."""
        # The counter does not see fused attention.
        grad, attention, random = torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), seeded_everywhere(self._device, 0)
        with torch.inference_mode(False), grad, attention, eagerly_counted(), random, torch.device(self._device):
            images = torch.rand(batch, *shape).to(self._dtype)
            with self.counter, self.watch:
                self.run(images)
        return self

    def changes(self, node: fx.Node) -> frozenset[int]:
        """Return the identities of the memory that a node changed in place."""
        return self.watch.changes.get(node, frozenset())

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        inputs = pytree.tree_leaves([self.env[node] for node in n.all_input_nodes])
        self.reads[n] = frozenset(_memory(tensor) for tensor in inputs if isinstance(tensor, Tensor))
        before = self.counter.get_total_flops()
        self.watch.node = n
        result = super().run_node(n)
        self.watch.node = None
        self.macs[n] = (self.counter.get_total_flops() - before) // 2
        self.results[n] = result = self._placed(result)
        return result

    def _placed(self, result: Any) -> Any:
        """Return tensors without values in place of those that the network makes on another device."""
        if self._device.type != "meta":
            return result
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), result)


def run_nodes(module: nn.Module, graph: fx.Graph, input_shape: tuple[int, int, int]) -> NodeRun:
    """Run a graph on one image, without values if its module supports that.

    Args:
        module: the module that the graph belongs to; a copy of it runs.
        graph: the graph.
        input_shape: (channels, height, width) of the image.
    """
    # Copies that are made in inference mode could not be computed with outside of it.
    with torch.inference_mode(False):
        try:
            return NodeRun(copied(module).to("meta"), graph).on(1, input_shape)
        except UserError:
            raise
        except Exception:  # parts that need values, or that can't be moved, raise errors of many types
            return NodeRun(copied(module), graph).on(1, input_shape)
