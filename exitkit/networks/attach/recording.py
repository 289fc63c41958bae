"""Recording of a forward pass as a torch.fx graph, with everything that a graph can't repeat as an `Obstacle`.

torch.fx runs the Python code of `forward` once, on symbols in place of tensors. What the code does besides operations
on these symbols would happen once, at the time of recording, and never again: it is an obstacle. A module with an
obstacle is not recorded but called as a whole, so that its own code runs in every forward pass.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import linecache
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, Proxy, TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree

from exitkit.engine.randomness import numpy_and_python_states, restore_numpy_and_python

SUBMODULE = "move this into a submodule, which is then called as a whole"


class Reason(NamedTuple):
    """Why a forward pass can't be recorded.

    Attributes:
        what: what the code does, as a verb phrase ("sets its attribute count").
        where: `file:line` of the code, or an empty string.
        remedy: what to do about it.
    """

    what: str
    where: str = ""
    remedy: str = SUBMODULE

    def __str__(self) -> str:
        return f"{self.what} at {self.where}" if self.where else self.what


class Obstacle(Exception):
    """Code in a forward pass that a graph can't repeat."""

    def __init__(self, what: str, remedy: str = SUBMODULE) -> None:
        super().__init__(what)
        self.reason = Reason(what, line_of(sys._getframe(1)), remedy)
        for recorder in Recorder.active:
            recorder.add(self)  # even if the code of the network catches the error


# --- lines of the user's code

_INNER = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), "<eval_with_key>", contextlib.__file__)


def line_of(frame: FrameType | None) -> str:
    """Return `file:line` of the innermost frame that is neither torch's nor exitkit's, or an empty string."""
    while frame is not None and frame.f_code.co_filename.startswith(_INNER):
        frame = frame.f_back
    return "" if frame is None else _line(frame.f_code.co_filename, frame.f_lineno)


def line_of_error(traceback: TracebackType | None) -> str:
    """Return `file:line` of the innermost line of the user's code in a traceback, or an empty string."""
    found = ""
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(_INNER):
            found = _line(file, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found


def line_of_forward(module: nn.Module) -> str:
    """Return `file:line` of the definition of a module's forward."""
    code = getattr(type(module).forward, "__code__", None)
    return "" if code is None else _line(code.co_filename, code.co_firstlineno)


def _line(file: str, line: int) -> str:
    path, folder = Path(file), Path.cwd()
    return f"{path.relative_to(folder) if path.is_relative_to(folder) else path}:{line}"


# --- symbols


class Symbol(Proxy):
    """A tensor, or a number computed from one, while a forward pass is recorded.

    Attributes:
        tensor: the parameter or buffer that it stands for, if it does; its shape and type are known.
    """

    tensor: Tensor | None

    def __init__(self, node: fx.Node, tracer: Any, tensor: Tensor | None = None) -> None:
        super().__init__(node, tracer)
        object.__setattr__(self, "tensor", tensor)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise Obstacle(f"sets {name} of a tensor")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self.tensor is not None and name in _SHAPE:
            return getattr(self.tensor, name)
        return SymbolAttribute(self, name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", set_item, (self, key, value), {})

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        if _is_plain_assertion(frame):
            self.tracer.create_proxy("call_function", check, (self, line_of(frame)), {})
            return True
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if line.startswith("assert"):
            raise Obstacle("asserts something of a tensor or its size", "remove the assert, or write torch._assert")
        raise Obstacle("has control flow that depends on a tensor or its size")

    def __int__(self) -> int:
        raise Obstacle("converts a tensor or a size to a number of Python")

    __float__ = __index__ = __complex__ = __int__

    def __len__(self) -> int:
        raise Obstacle("takes the len of a tensor", "write x.shape[0] instead of len(x)")

    def __contains__(self, item: Any) -> bool:
        raise Obstacle("has control flow that depends on a tensor or its size")


_SHAPE = ("shape", "size", "dim", "ndim", "numel", "nelement")
"""What is known of a parameter or buffer; its type and device may change after recording."""


class SymbolAttribute(Attribute, Symbol):
    """An attribute of a symbol, which becomes a node when it is used other than by a call."""

    tensor = None


def _in_place(name: str) -> Callable[[Symbol, Any], Any]:
    def apply(self: Symbol, value: Any) -> Any:
        # The node has the name of the operation out of place, as torchvision names it.
        return self.tracer.create_proxy("call_function", in_place, (self, name, value), {}, name=name[1:])

    return apply


for _name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Symbol, f"__{_name}__", _in_place(_name))


def in_place(target: Any, name: str, value: Any) -> Any:
    """Return the result of `target += value`, or of another operation in place ("isub", ...)."""
    return getattr(operator, name)(target, value)


def set_item(target: Any, key: Any, value: Any) -> None:
    """Repeat `target[key] = value`."""
    target[key] = value


def make(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make a tensor by the function of torch that has this name."""
    return getattr(torch, name)(*args, **kwargs)


def choose(values: tuple[Any, Any], training: bool) -> Any:
    """Return the first value in evaluation, and the second in training."""
    return values[training]


def check(condition: Any, where: str) -> None:
    """Repeat an assertion of the network's own code."""
    if not condition:
        raise AssertionError(f"the assertion at {where} does not hold")


_COMPARED = (
    *(ast.Compare, ast.BoolOp, ast.And, ast.BinOp, ast.operator, ast.UnaryOp, ast.USub, ast.Call, ast.expr_context),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot),
    *(ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant),
)


OWN = (in_place, set_item, make, choose, check, builtins.len)


def as_one_node(node: fx.Node) -> fx.Node:
    """Keep a call of a function a single node when its graph is read from a pickle, which traces it again."""
    node.meta["is_wrapped"] = True
    return node


def _is_plain_assertion(frame: FrameType) -> bool:
    """Whether the current line is an assertion that holds only if everything in it that is tested holds."""
    try:
        (statement,) = ast.parse(linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()).body
    except (SyntaxError, ValueError):
        return False
    if not isinstance(statement, ast.Assert):
        return False
    parts = list(ast.walk(statement.test))
    called = [part.func for part in parts if isinstance(part, ast.Call)]
    functions = {function.id for function in called if isinstance(function, ast.Name)}
    return all(isinstance(part, _COMPARED) for part in parts) and functions <= {"len", "isinstance"}


def is_tensor(symbol: Symbol) -> bool:
    """Whether a symbol stands for a tensor, as far as its node tells."""
    node = symbol.node
    if node.op in ("placeholder", "get_attr", "call_module"):
        return True
    if node.op == "call_method":
        return node.target not in ("size", "dim", "numel", "nelement", "item", "tolist", "stride", "chunk", "split")
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "H", "mH", "data", "real", "imag", "grad")
    parts = [argument for argument in node.all_input_nodes if is_tensor(Symbol(argument, symbol.tracer))]
    return bool(parts) if getattr(node.target, "__module__", "") in ("_operator", "math", __name__) else True


# --- recording


class Recorder(fx.Tracer):
    """Records one forward pass of a network in its present mode.

    Args:
        whole: modules that are called as a whole, by path, and why.
        changing: {(path of a module, attribute)} that forward passes change.

    Attributes:
        names: the name of each node that depends on images or parameters, as torchvision's feature extraction names
            it: the path of its module, and the operation. A module that is called is named by its path.
        ran: paths of the modules that were called.
        found: the obstacles found, by path of the module; that of the network itself is the empty path.
        constants: tensors of the graph that no module holds, by their name in the graph.
    """

    active: ClassVar[list[Recorder]] = []

    def __init__(self, whole: Mapping[str, Reason], changing: set[tuple[str, str]]) -> None:
        wrapped = [module for name in ("torchvision.ops", "einops") if (module := sys.modules.get(name)) is not None]
        timm = sys.modules.get("timm.layers")
        functions = () if timm is None else tuple(timm.get_notrace_functions())
        super().__init__(autowrap_modules=(math, *wrapped), autowrap_functions=functions)  # type: ignore[arg-type]
        self._leaf_types = () if timm is None else tuple(timm.get_notrace_modules())
        self._whole, self._changing = whole, changing
        self._path = ""
        self._counts: dict[str, int] = {}
        self._keys: dict[str, int] = {}
        self._held: dict[str, Symbol] = {}
        self._undo = contextlib.ExitStack()
        self.names: dict[fx.Node, str] = {}
        self.ran: set[str] = set()
        self.found: dict[str, Reason] = {}
        self.constants: dict[str, Tensor] = {}

    def record(self, model: nn.Module, fixed: Mapping[str, Any]) -> fx.Graph | None:
        """Return the graph of `model.forward`, or None if there are obstacles; they are in `found`.

        Args:
            model: the network.
            fixed: values of the arguments of `forward` other than the images.
        """
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._tensors = {
            id(tensor): name
            for held in (model.named_buffers(remove_duplicate=False), model.named_parameters(remove_duplicate=False))
            for name, tensor in held
        }
        for path, module in self._modules.items():
            tensors = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
            self._tensors.update({id(value): _join(path, name) for name, value in tensors.items()})
        try:
            with _environment(self), self._observed("", model):
                graph = self.trace(model, concrete_args=dict(fixed) or None)
        except Exception as error:  # a user's forward may raise any error on symbols
            self.add(error)
            return None
        return None if self.found else graph

    def add(self, error: Exception) -> None:
        """Add an obstacle in the forward of the module at hand."""
        self.found.setdefault(self._path, error.reason if isinstance(error, Obstacle) else _reason_of(error))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called instead of recorded."""
        return self.why_whole(m, module_qualified_name) is not None

    def why_whole(self, module: nn.Module, path: str) -> Reason | None:
        """Return why a module is called as a whole, or None if its forward is recorded."""
        if super().is_leaf_module(module, path):
            return Reason("is one module of torch.nn")
        if isinstance(module, self._leaf_types) or type(module).__module__.startswith("torchvision.ops"):
            return Reason(f"is one module of {type(module).__module__.partition('.')[0]}")
        return self._whole.get(path) or unrecordable(module)

    def path_of_module(self, mod: nn.Module) -> str:
        """Return the path of a module of the network."""
        try:
            return super().path_of_module(mod)
        except NameError:
            held = "hold it as an attribute or in nn.ModuleList, so that it is a submodule"
            raise Obstacle(f"calls a {type(mod).__name__} that is no submodule of the network", held) from None

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call of a module; an obstacle in its forward makes it a module that is called as a whole."""
        path = self.path_of_module(m)
        self.ran.add(path)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        before, self._path = self._path, path
        try:
            with self._observed(path, m):
                return forward(*args, **kwargs)
        except Exception as error:  # a user's forward may raise any error on symbols
            self.add(error)
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self._path = before

    @contextlib.contextmanager
    def _observed(self, path: str, module: nn.Module) -> Iterator[None]:
        """Find what a forward does outside the graph without an operation that shows it."""
        _use_symbols_in(getattr(type(module).forward, "__globals__", {}), self._undo)
        before = numpy_and_python_states()
        yield
        if numpy_and_python_states() != before:
            remedy = f"draw them by torch.rand, or {SUBMODULE}"
            reason = Reason("draws random numbers of Python or NumPy", line_of_forward(module), remedy)
            self.found.setdefault(path, reason)
            restore_numpy_and_python(before)

    def proxy(self, node: fx.Node) -> Symbol:
        """Return the symbol of a node."""
        return Symbol(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        """Make a node, and record where it comes from.

        Its `meta` has the path of the module whose code it is of, `file:line`, a key that is the same in training and
        evaluation, and whether it depends on the images (`images`), or on images or parameters (`live`).
        """
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        base = str(target) if kind in ("call_module", "get_attr") else _join(self._path, _unnumbered(node.name))
        inputs = node.all_input_nodes
        node.meta.update(
            path=self._path,
            where=line_of(sys._getframe(1)),
            key=f"{kind} {base} {_next(self._keys, base) if kind != 'get_attr' else 0}",
            images=kind == "placeholder" or any(source.meta["images"] for source in inputs),
            live=kind == "placeholder" or any(source.meta["live"] for source in inputs),
        )
        if target in OWN:
            as_one_node(node)
        if kind.startswith("call_") and (node.meta["live"] or kind == "call_module"):
            self.names[node] = self._name(base)
        return node

    def _name(self, base: str) -> str:
        while True:
            number = _next(self._counts, base)
            name = f"{base}_{number}" if number else base
            if not number or name not in self._modules:
                return name

    def create_arg(self, a: Any) -> Any:
        """Return the argument of a node for a value; tensors become nodes that fetch them."""
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor):
            return self.held(a).node
        return super().create_arg(a)

    def held(self, tensor: Tensor) -> Symbol:
        """Return the symbol of a tensor that is held by a module, or is a constant in the code.

        Raises:
            Obstacle: forward passes change it, or it is a parameter that no module holds.
        """
        name = self._tensors.get(id(tensor))
        if name is None and isinstance(tensor, nn.Parameter):
            held = "hold it as an attribute, or in nn.ParameterList"
            raise Obstacle("uses a parameter that no module of the network holds", held)
        if name is None:
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
            self._tensors[id(tensor)] = name
        path, _, attribute = name.rpartition(".")
        if (path, attribute) in self._changing:
            raise Obstacle(f"uses {name}, which changes with every forward pass")
        if name not in self._held:
            node = self.create_node("get_attr", name, (), {})
            node.meta["live"] = isinstance(tensor, nn.Parameter)
            self._held[name] = Symbol(node, self, tensor)
        return self._held[name]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return what the code reads as an attribute of a module: the symbol of a parameter or buffer."""
        return self.held(attr_val) if isinstance(attr_val, Tensor) else attr_val

    def check_attribute(self, module: nn.Module, name: str) -> None:
        """Refuse to read an attribute that forward passes change."""
        path = self.submodule_paths.get(module) if self.submodule_paths else None
        if path is not None and (path, name) in self._changing:
            raise Obstacle(f"uses {_join(path, name)}, which changes with every forward pass")

    @property
    def changing_names(self) -> set[str]:
        """Names of the attributes that forward passes change, of whatever module."""
        return {name for _, name in self._changing}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=.)_\d+$", "", name)


def _next(counts: dict[str, int], key: str) -> int:
    counts[key] = counts.get(key, -1) + 1
    return counts[key]


def unrecordable(module: nn.Module) -> Reason | None:
    """Return what keeps a module from being recorded whatever its forward does, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return Reason("is scripted", "", "attach exits before torch.jit.script")
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return Reason("is compiled", "", "attach exits before torch.compile")
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        for hook in getattr(module, f"_{kind}_hooks").values():
            code = getattr(hook, "__code__", None)
            where = "" if code is None else _line(code.co_filename, code.co_firstlineno)
            name = getattr(hook, "__name__", type(hook).__name__)
            what = f"has the {kind.replace('_', '-')} hook {name}"
            return Reason(what, where, "add it to the attached network instead")
    return None


def _reason_of(error: Exception) -> Reason:
    where, text = line_of_error(error.__traceback__), " ".join(str(error).split())
    if isinstance(error, TraceError) and "iterated" in text:
        return Reason("loops over a tensor or a size, or unpacks one", where)
    text = text.replace("'Symbol' object", "a tensor").replace("Symbol", "a tensor").replace("'a tensor'", "a tensor")
    return Reason(f"raises {type(error).__name__} for tensors without values ({text})", where)


# --- the environment in which a forward is recorded

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
)


class _Constants(TorchFunctionMode):
    """Records operations on tensors that are no symbols as well, so that they are computed in every forward pass."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            raise Obstacle("turns gradients on or off", "freeze parameters by requires_grad_(False), or " + SUBMODULE)
        if isinstance(func, torch._C.ScriptMethod) or (name in _KNOWN and not has_symbol((args, kwargs))):
            return func(*args, **kwargs)
        kind, target = ("call_method", name) if is_tensor_method_or_property(func) else ("call_function", func)
        return self.recorder.create_proxy(kind, target, args, kwargs)


_KNOWN = {"__get__", "__set__", "__repr__", "__format__", "__len__", "__iter__", "__contains__", "__array__", "numpy"}
_KNOWN |= {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", *_SHAPE}
"""What is known of a constant, and what Python needs a value for."""


def has_symbol(values: Any) -> bool:
    """Whether there is a symbol among nested values."""
    return any(isinstance(leaf, Symbol) for leaf in pytree.tree_leaves(values))


@contextlib.contextmanager
def _environment(recorder: Recorder) -> Iterator[None]:
    """Replace functions of torch that would act on the time of recording only; all is undone at the end."""
    with contextlib.ExitStack() as undo:
        recorder._undo = undo
        recorder.active.append(recorder)
        undo.callback(recorder.active.remove, recorder)
        for name in _FACTORIES:
            _replace(torch, name, _recorded(recorder, name), undo)
        _replace(torch.utils.checkpoint, "checkpoint", _without_checkpoint, undo)
        _replace(torch, "manual_seed", _refused("seeds random numbers"), undo)
        _replace(torch.autocast, "__enter__", _refused("enters torch.autocast"), undo)
        _replace(torch.inference_mode, "__enter__", _refused("enters torch.inference_mode"), undo)
        _replace(torch.autograd.Function, "apply", _refused("calls an autograd.Function"), undo)
        _replace(nn.Module, "__setattr__", _refused_attribute("sets"), undo)
        _replace(nn.Module, "__delattr__", _refused_attribute("deletes"), undo)
        if recorder.changing_names:
            _replace(nn.Module, "__getattribute__", _checked_attribute(recorder), undo)
        undo.enter_context(_Constants(recorder))
        yield


def _replace(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    """Set an attribute until the end of recording."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _recorded(recorder: Recorder, name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: recorder.create_proxy("call_function", make, (name, *args), kwargs, name=name)


def _refused(what: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Obstacle(what)

    return refuse


def _refused_attribute(verb: str) -> Callable[..., None]:
    def refuse(module: nn.Module, name: str, *value: Any) -> None:
        raise Obstacle(f"{verb} its attribute {name}")

    return refuse


def _checked_attribute(recorder: Recorder) -> Callable[[nn.Module, str], Any]:
    names = recorder.changing_names

    def read(module: nn.Module, name: str) -> Any:
        if name in names:
            recorder.check_attribute(module, name)
        return object.__getattribute__(module, name)

    return read


def _without_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function directly: recomputing activations changes memory and time, not the results."""
    settings = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
    return function(*args, **{name: value for name, value in kwargs.items() if name not in settings})


def _use_symbols_in(scope: dict[str, Any], undo: contextlib.ExitStack) -> None:
    """Make `len`, `isinstance` and `checkpoint` accept symbols in the code of a module, until recording ends."""
    own = {"len": _len, "isinstance": _isinstance}
    for name, replacement in own.items():
        if name not in scope:
            scope[name] = replacement
            undo.callback(scope.pop, name, None)
    for name in [name for name, value in scope.items() if value is _CHECKPOINT]:
        undo.callback(scope.__setitem__, name, scope[name])
        scope[name] = _without_checkpoint


_CHECKPOINT = torch.utils.checkpoint.checkpoint


def _len(value: Any) -> Any:
    if isinstance(value, Symbol):
        return value.tracer.create_proxy("call_function", builtins.len, (value,), {})
    return builtins.len(value)


def _isinstance(value: Any, kinds: Any) -> bool:
    if isinstance(value, Symbol):
        among = kinds if builtins.isinstance(kinds, tuple) else (kinds,)
        return is_tensor(value) and any(kind is Tensor for kind in among)
    return builtins.isinstance(value, kinds)
