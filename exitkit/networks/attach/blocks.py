"""Networks that are cut between the blocks of a list, also where torch.fx can't trace them.

Only the code around the blocks is recorded; every block, and every module beside them, is called as a whole. The
network runs on random images, so that its code may ask for types and sizes. Four runs are compared, of two and of three
images, in evaluation and in training: a number that follows the number of images, and a constant that follows the mode,
do so in the graph as well. Other numbers are fixed, so that the graph is for images of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import pairwise
from operator import getitem, mul, setitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from exitkit.engine.randomness import seeded_everywhere
from exitkit.errors import UserError
from exitkit.networks.attach.modes import MODE, TrainingMode
from exitkit.networks.attach.recording import Reason, as_one_node, choose, line_of_error
from exitkit.networks.attach.split import Plan
from exitkit.networks.attach.trace import Traced, add_parts, check_supported, meta_copy, other_inputs
from exitkit.networks.copying import copied
from exitkit.networks.inputs import reference_tensor


def block_paths(model: nn.Module, blocks: str) -> list[str]:
    """Return the paths of all blocks, in the order of the network's modules.

    Args:
        model: the network.
        blocks: path of the list of blocks; `*` stands for any name (`encoder.stages.*.layers`).

    Raises:
        UserError: there is no such list, or it has fewer than two blocks.
    """
    if not isinstance(blocks, str):
        raise UserError(f"blocks is {blocks!r:.80}; expected the path of a list, such as encoder.layer")
    depth = blocks.count(".")
    lists = [
        (path, part)
        for path, part in model.named_modules()
        if path.count(".") == depth
        and all(map(fnmatchcase, path.split("."), blocks.split(".")))
        and isinstance(part, nn.ModuleList | nn.Sequential)
    ]
    paths = [f"{path}.{name}" for path, part in lists for name, _ in part.named_children()]
    if len(paths) < 2:
        known = find_blocks(model)
        remedy = f"expected the path of a list, such as {known}" if known else "it has no list of blocks"
        raise UserError(f"{type(model).__name__} has no list of at least two blocks at {blocks!r}; {remedy}")
    return paths


def find_blocks(model: nn.Module) -> str | None:
    """Return the path of the list of blocks that has most of the network's parameters, or None if there is no list.

    If its blocks are lists themselves, or each has a list of the same name with most of their parameters, it is the
    path of those lists.
    """
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outermost:
        return None
    path: str = max(outermost, key=lambda path: _elements(lists[path]))
    if all(isinstance(block, nn.ModuleList | nn.Sequential) for block in lists[path]):
        return f"{path}.*"
    inner = [
        {name for name, part in block.named_children() if isinstance(part, nn.ModuleList | nn.Sequential)}
        for block in lists[path]
    ]
    for name in sorted(set.intersection(*inner)):
        if 2 * sum(_elements(block.get_submodule(name)) for block in lists[path]) > _elements(lists[path]):
            return f"{path}.*.{name}"
    return path


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def ends_of_blocks(plan: Plan, blocks: list[str]) -> list[int]:
    """Return, for each block but the last, the first place at its end or behind it at which the network can be cut.

    Raises:
        UserError: a block does not run, or the network can't be cut between two of them.
    """
    position = {str(node.target): place for place, node in enumerate(plan.nodes) if node.op == "call_module"}
    for block in blocks:
        if block not in position:
            raise UserError(f"{block} of {plan.traced.name} does not run; give the path of blocks that all run")
    runs = sorted(blocks, key=position.__getitem__)
    ends = []
    for block, following in pairwise(runs):
        found = [place for place in plan.places if position[block] <= place < position[following]]
        if not found:
            reasons = [plan.obstacle(place) for place in range(position[block], position[following])]
            raise UserError(f"{plan.traced.name} can't be cut behind {block}: {reasons[0]}")
        ends.append(found[0])
    return ends


# --- recording


class _Value(NamedTuple):
    """A tensor that a call has returned: the number of the call, and the keys that lead to it in the result."""

    call: int
    keys: tuple[Any, ...] = ()


class _Held(NamedTuple):
    """A parameter or buffer, or a constant of the code, by its name in the graph."""

    name: str


class _Call(NamedTuple):
    """A call of a function, a method or a module; arguments that are tensors are of `_Value` and `_Held`."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_READS_VALUES = {"item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class _Recording(TorchFunctionMode):
    """Records one run of a network.

    Args:
        model: the network, which runs.
        inside: paths of the modules whose own code is recorded.
    """

    def __init__(self, model: nn.Module, inside: set[str]) -> None:
        super().__init__()
        self._paths = {module: path for path, module in model.named_modules()}
        self._inside = inside
        self._whole = False
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._known: dict[int, _Value | _Held] = {id(tensor): _Held(name) for name, tensor in held}
        self._alive: list[Any] = [tensor for _, tensor in held]  # an identity that is free may be used again
        self._of_images = {0}
        self.calls: list[_Call] = [_Call("placeholder", "images", (), {})]
        self.constants: dict[str, Tensor] = {}
        self.logits: _Value | _Held | None = None

    def run(self, model: nn.Module, images: Tensor) -> None:
        """Record the network's run on images.

        Raises:
            UserError: it reads the values of a tensor, or does not return logits.
        """
        self._remember(images, _Value(0))
        with torch.no_grad(), self._called(), self:
            result = model(images)
        logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
        if not isinstance(logits, Tensor):
            raise UserError(
                f"{type(model).__name__} returns a {type(result).__name__}; expected logits, or an object that has them"
            )
        self.logits = self._value(logits)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._whole:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        inputs = list(_tensors((args, kwargs)))
        if name in _READS_VALUES and any(self._follows_images(tensor) for tensor, _ in inputs):
            raise UserError("reads the values of a tensor that depends on the images")
        result = func(*args, **kwargs)
        if name == "__setitem__":
            return self._record(_Call("call_function", setitem, args, {}), result)
        if not any(True for _ in _tensors(result)):
            return result
        if name == "__get__":
            call = _Call("call_function", getattr, (args[0], func.__self__.__name__), {})
        elif is_tensor_method_or_property(func):
            call = _Call("call_method", name, args, kwargs)
        else:
            call = _Call("call_function", func, args, kwargs)
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        return self._record(call, result, keep=in_place or kwargs.get("out") is not None)

    @contextmanager
    def _called(self) -> Iterator[None]:
        """Record calls of modules: those that are not inside are run as a whole."""
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self._paths.get(module)
            if self._whole or path is None or path in self._inside:
                return plain(module, *args, **kwargs)
            self._whole = True
            try:
                result = plain(module, *args, **kwargs)
                return self._record(_Call("call_module", path, args, kwargs), result)
            finally:
                self._whole = False

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]

    def _record(self, call: _Call, result: Any, keep: bool = False) -> Any:
        """Record a call, and return its result, in which no tensor is one that is known already.

        A module may return its input in one mode only (dropout), and the input may be used again.
        """
        number = len(self.calls)
        args, kwargs = _replaced((call.args, call.kwargs), self._value)
        self.calls.append(call._replace(args=args, kwargs=kwargs))
        if any(self._follows_images(tensor) for tensor, _ in _tensors((call.args, call.kwargs))):
            self._of_images.add(number)
        if not keep:
            result = _replaced(result, lambda tensor: tensor.view_as(tensor) if id(tensor) in self._known else tensor)
        for tensor, keys in _tensors(result):
            self._remember(tensor, _Value(number, keys))
        return result

    def _follows_images(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return isinstance(known, _Value) and known.call in self._of_images

    def _remember(self, tensor: Tensor, value: _Value) -> None:
        self._known[id(tensor)] = value
        self._alive.append(tensor)

    def _value(self, tensor: Tensor) -> _Value | _Held:
        if id(tensor) not in self._known:
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
            self._known[id(tensor)] = _Held(name)
        return self._known[id(tensor)]


def _tensors(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """Yield the tensors of nested tuples, lists and dictionaries, with the keys that lead to them."""
    if isinstance(value, Tensor):
        yield value, keys
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*keys, key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _tensors(item, (*keys, index))


def _replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return nested tuples, lists and dictionaries with each tensor changed; containers without a change are kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        items: Any = {key: _replaced(item, change) for key, item in value.items()}
        return value if all(items[key] is item for key, item in value.items()) else _like(value, items)
    if isinstance(value, tuple | list):
        items = [_replaced(item, change) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else _like(value, items)
    return value


def _like(value: Any, items: Any) -> Any:
    """Return a container of the same type with other items."""
    if isinstance(value, dict):
        return items if type(value) is dict else type(value)(**items)
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


# --- the graph of four runs


def trace_blocks(model: nn.Module, blocks: str, input_shape: tuple[int, int, int]) -> Traced:
    """Return the graph of a network whose blocks, and whose modules beside them, are called as a whole.

    Args:
        model: the network; it does not change.
        blocks: path of the list of blocks; see `block_paths`.
        input_shape: (channels, height, width) of an image.

    Raises:
        UserError: there are no such blocks; the network does not accept such images or does not return logits; or the
            code around the blocks reads values of tensors, or computes differently in training.
    """
    check_supported(model)
    other_inputs(model)
    name = type(model).__name__
    paths = block_paths(model, blocks)
    inside = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)} | {""}
    runs = [_run(model, inside, input_shape, images, training) for training in (False, True) for images in (2, 3)]
    first, *others = runs
    for number, call in enumerate(first.calls):
        same = [run.calls[number] if number < len(run.calls) else None for run in others]
        if any(other is None or (other.op, other.target) != (call.op, call.target) for other in same):
            raise UserError(f"{name} computes {_described(call)} in some runs only; expected one forward for all")
    if any((run.logits, len(run.calls)) != (first.logits, len(first.calls)) for run in others):
        raise UserError(
            f"{name} returns other logits, or computes more, in training; expected one forward for both modes"
        )
    graph = _Graph(name, runs, input_shape).graph()
    return _traced(model, graph, first, paths, inside)


def _described(call: _Call) -> str:
    return str(getattr(call.target, "__name__", call.target))


def _run(
    model: nn.Module, inside: set[str], input_shape: tuple[int, int, int], images: int, training: bool
) -> _Recording:
    """Record a run of a copy of the network."""
    copy = copied(model).train(training)
    recording = _Recording(copy, inside)
    reference = reference_tensor(copy)
    size = "x".join(map(str, input_shape))
    with seeded_everywhere(reference.device, images):
        batch = torch.rand(images, *input_shape).to(reference)
        try:
            recording.run(copy, batch)
        except UserError as error:
            name, where = type(model).__name__, line_of_error(error.__traceback__)
            raise UserError(
                f"{name} can't be cut between blocks: {error}{f' (at {where})' if where else ''}"
            ) from error
        except Exception as error:  # a user's forward may raise any error
            reason = " ".join(str(error).split())
            raise UserError(f"{type(model).__name__} does not accept images of {size} ({reason})") from error
    return recording


def of_size(images: Any, shape: tuple[int, int, int]) -> Any:
    """Return images if they have the size that a network's stages were made for.

    Raises:
        UserError: they have another size.
    """
    if tuple(images.shape[1:]) != shape:
        sizes = ["x".join(map(str, size)) for size in (images.shape[1:], shape)]
        raise UserError(f"the images are {sizes[0]}; this network was cut for images of {sizes[1]}")
    return images


class _Graph:
    """The graph that does what four runs have done.

    Args:
        name: the network's class.
        runs: two and three images in evaluation, then in training.
        input_shape: (channels, height, width) of an image.
    """

    def __init__(self, name: str, runs: list[_Recording], input_shape: tuple[int, int, int]) -> None:
        self._name, self._runs = name, runs
        self._graph = fx.Graph()
        self._images = self._graph.placeholder("images")
        self._nodes = [as_one_node(self._graph.call_function(of_size, (self._images, input_shape)))]

    def graph(self) -> fx.Graph:
        """Return the graph.

        Raises:
            UserError: runs differ by more than the number of images and the mode.
        """
        first, *others = self._runs
        for number, call in enumerate(first.calls[1:], 1):
            alike = [run.calls[number] for run in others]
            args = self._argument(call, (call.args, *(other.args for other in alike)))
            kwargs = self._argument(call, (call.kwargs, *(other.kwargs for other in alike)))
            self._nodes.append(self._graph.create_node(call.op, call.target, args, kwargs))
        self._graph.output(self._argument(first.calls[0], (first.logits,) * 4))
        for index, node in enumerate(self._graph.nodes):
            node.meta.update(path="", where="", key=str(index), images=True, live=True)
        return self._graph

    def _argument(self, call: _Call, values: tuple[Any, ...]) -> Any:
        """Return an argument of the graph for its values in the four runs."""
        value = values[0]
        if isinstance(value, _Value | _Held):
            if any(other != value for other in values):
                raise self._refused(call)
            return self._tensor(value)
        if isinstance(value, dict | list | tuple):
            if any(type(other) is not type(value) or len(other) != len(value) for other in values):
                raise self._refused(call)
            if isinstance(value, dict):
                return {key: self._argument(call, tuple(other[key] for other in values)) for key in value}
            items = [self._argument(call, each) for each in zip(*values, strict=True)]
            return _like(value, items)
        if isinstance(value, torch.device):
            return self._graph.call_function(getattr, (self._images, "device"))
        if all(type(other) is type(value) and other == value for other in values):
            return value
        return self._changing(call, values)

    def _changing(self, call: _Call, values: tuple[Any, ...]) -> Any:
        """Return a number that is a multiple of the number of images, or a constant that follows the mode."""
        two, three, *training = values
        if type(two) is int and [two, three] == training and 3 * two == 2 * three:
            images = self._graph.call_method("size", (self._images, 0))
            return images if two == 2 else self._graph.call_function(mul, (images, two // 2))
        if two == three and training[0] == training[1]:
            mode = self._graph.call_module(MODE)
            return as_one_node(self._graph.call_function(choose, ((two, training[0]), mode)))
        raise self._refused(call)

    def _tensor(self, value: _Value | _Held) -> fx.Node:
        if isinstance(value, _Held):
            return self._graph.get_attr(value.name)
        node = self._nodes[value.call]
        for key in value.keys:
            node = self._graph.call_function(getitem, (node, key))
        return node

    def _refused(self, call: _Call) -> UserError:
        return UserError(
            f"{self._name} can't be cut between blocks: {_described(call)} has other arguments for another number of "
            "images, or in training; expected one forward for all"
        )


def _traced(model: nn.Module, graph: fx.Graph, run: _Recording, paths: list[str], inside: set[str]) -> Traced:
    """Return the graph with the parts of the network that it uses."""
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if target == MODE:
            parts[target] = TrainingMode().train(model.training)
        elif node.op == "get_attr" and target in run.constants:
            parts[target] = run.constants[target]
        elif node.op in ("call_module", "get_attr"):
            owner, _, attribute = target.rpartition(".")
            parts[target] = getattr(model.get_submodule(owner), attribute)
    outline = meta_copy(model)
    add_parts(outline, parts)
    names = {node: str(node.target) for node in graph.nodes if node.op == "call_module" and node.target != MODE}
    whole = {path: Reason("is one block") for path in paths}
    return Traced(type(model).__name__, graph, names, parts, outline, whole, [])
