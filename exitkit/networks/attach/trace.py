"""A network as a torch.fx graph that repeats its forward pass, in training and in evaluation.

The nodes have the names of `torchvision.models.feature_extraction.get_graph_node_names`; nodes of a module that is
called have its path. The graph is that of evaluation; numbers and flags that differ in training (functional dropout)
follow the mode of the module that they belong to.

Modules are recorded node by node where that is possible. A module whose forward does something that a graph can't
repeat (see `recording`), or that computes differently in training, is one node that calls the module itself.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from exitkit.errors import Note, UserError
from exitkit.networks.attach.modes import MODE, Merge, TrainingMode
from exitkit.networks.attach.recording import Reason, Recorder, unrecordable
from exitkit.networks.copying import copied


class Traced(NamedTuple):
    """A network's graph.

    Attributes:
        name: the network's class.
        graph: the computation in evaluation; its placeholder is the images.
        names: the name of each node that has one.
        parts: the network's own modules, parameters and tensors that the graph uses, by name.
        outline: a copy of the network, on the `meta` device unless a part of it does not support that.
        whole: why modules are called as a whole, by path.
        left_out: names of nodes that run in training only, which the graph leaves out.
    """

    name: str
    graph: fx.Graph
    names: dict[fx.Node, str]
    parts: dict[str, Any]
    outline: nn.Module
    whole: dict[str, Reason]
    left_out: list[str]

    def with_values(self, model: nn.Module) -> nn.Module:
        """Return a copy of the network itself in evaluation mode, for running the graph on images."""
        copy = copied(model).eval()
        add_parts(copy, self.parts)
        return copy


def trace(model: nn.Module, changing: set[tuple[str, str]]) -> Traced:
    """Return the graph of a network whose only input is images.

    Args:
        model: the network.
        changing: {(path of a module, attribute)} that forward passes are known to change.

    Raises:
        UserError: the network's own forward does something that a graph can't repeat, or computes differently in
            training.
    """
    name = type(model).__name__
    check_supported(model)
    fixed = other_inputs(model)
    outline = meta_copy(model)
    recorder, graph, left_out = _record(name, outline, fixed, changing)
    if left_out:
        few = ", ".join(left_out[:3])
        warnings.warn(f"{name} runs {few} in training only; the stages leave it out", Note, stacklevel=4)
    _drop_fixed_inputs(name, graph)
    parts = _parts(model, outline, graph, recorder.constants)
    names = {node: recorder.names[node] for node in graph.nodes if node in recorder.names}
    return Traced(name, graph, names, parts, outline, _explained(model, recorder), left_out)


def _record(
    name: str, outline: nn.Module, fixed: Mapping[str, Any], changing: set[tuple[str, str]]
) -> tuple[Recorder, fx.Graph, list[str]]:
    """Return the recording of evaluation, its graph that follows the mode, and what runs in training only.

    Each round calls the modules as a whole in whose forward the rounds before found obstacles.
    """
    whole: dict[str, Reason] = {}
    while True:
        training, evaluation = Recorder(whole, changing), Recorder(whole, changing)
        training_graph, graph = training.record(outline.train(), fixed), evaluation.record(outline.eval(), fixed)
        found = training.found | evaluation.found
        if training_graph is not None and graph is not None:
            merged = Merge(training, training_graph, evaluation, graph)
            if not merged.found:
                return evaluation, graph, merged.left_out
            found = merged.found
        new = {path: reason for path, reason in found.items() if path and path not in whole}
        if not new:
            raise UserError(_refusal(name, found[""]))
        whole |= new


def _refusal(name: str, reason: Reason) -> str:
    if reason.what.startswith("computes "):
        return f"{name} {reason}; expected one forward for both modes: {reason.remedy}"
    return f"{name} can't be cut into stages: torch.fx can't trace it (its forward {reason}); {reason.remedy}"


def check_supported(model: nn.Module) -> None:
    """Check that a module is a network itself, and not a wrapper of one.

    Raises:
        UserError: it is a wrapper, scripted or compiled, has hooks, or has parameters without values.
    """
    name = type(model).__name__
    made_by = {"_orig_mod": "torch.compile", "module": "torch.nn.parallel"}
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    attribute = "_orig_mod" if hasattr(model, "_orig_mod") else "module" if isinstance(model, wrappers) else ""
    if attribute:
        raise UserError(f"{name} is a wrapper of {made_by[attribute]}; pass the network inside it: model.{attribute}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(f"{name} is scripted; expected the module that was given to torch.jit.script or trace")
    if "forward" in vars(model):
        raise UserError(f"the forward of this {name} was replaced; expected a class that defines its forward")
    reason = unrecordable(model)
    if reason is not None:
        raise UserError(f"{name} {reason}, which its stages would not run; remove it, and {reason.remedy}")
    empty = [path.rpartition(".")[0] for path, value in model.named_parameters() if nn.parameter.is_lazy(value)]
    if empty:
        kind = type(model.get_submodule(empty[0])).__name__
        raise UserError(
            f"{empty[0]} ({kind}) has no values yet; run the model once on a batch of images, then attach the exits"
        )


def other_inputs(model: nn.Module) -> dict[str, Any]:
    """Return the defaults of the arguments of forward besides the images.

    Raises:
        UserError: an argument has no default.
    """
    _, *others = inspect.signature(model.forward).parameters.values() or [None]
    plain = [p for p in others if p is not None and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in plain if p.default is p.empty]
    if needed:
        raise UserError(f"{type(model).__name__} has further inputs ({', '.join(needed)}); expected images only")
    return {p.name: p.default for p in plain}


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network on the `meta` device, unless a part of it does not support that."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        return copied(model)  # scripted parts can't be moved to the `meta` device
    memo: dict[int, object] = {id(p): _without_storage(p) for p in model.parameters()}
    return copied(model, memo).to("meta")


def _without_storage(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.is_floating_point())


def _drop_fixed_inputs(name: str, graph: fx.Graph) -> None:
    """Erase the placeholders of arguments other than the images.

    Raises:
        UserError: the network reads arguments that its forward takes as `*args` or `**kwargs`.
    """
    for node in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if str(node.target).startswith("*") and node.users:
            raise UserError(f"{name} has further inputs ({node.target}); expected images only")
        _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a placeholder of a fixed value, and the nodes that check the value."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _parts(model: nn.Module, outline: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the graph uses of the network, by name; the outline receives what is no part of the network."""
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or target in parts:
            continue
        owner, _, attribute = target.rpartition(".")
        if attribute == MODE:
            parts[target] = TrainingMode().train(model.get_submodule(owner).training)
        elif target in constants:
            parts[target] = constants[target]
        else:
            parts[target] = getattr(model.get_submodule(owner), attribute)
    add_parts(outline, parts)
    return parts


def add_parts(copy: nn.Module, parts: Mapping[str, Any]) -> None:
    """Add what is no part of the network, the modes and the constants, to a copy of it in evaluation mode."""
    for target, part in parts.items():
        owner, _, attribute = target.rpartition(".")
        if isinstance(part, TrainingMode):
            copy.get_submodule(owner).add_module(MODE, TrainingMode().eval())
        elif not hasattr(copy.get_submodule(owner), attribute):
            setattr(copy, target, part)


def _explained(model: nn.Module, recorder: Recorder) -> dict[str, Reason]:
    """Return why each module that the recording called as a whole is whole, by path."""
    reasons = {path: recorder.why_whole(model.get_submodule(path), path) for path in recorder.ran}
    return {path: reason for path, reason in reasons.items() if reason is not None}
