"""Exits attached to any classifier: the network is cut at named points, or at shares of its cost, into a cascade.

The stages are parts of the network's torch.fx graph. They use the network's own modules and parameters, not copies:
pretrained weights are kept, and training the cascade trains the original network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.errors import UserError
from exitkit.networks.attach.blocks import block_paths, ends_of_blocks, find_blocks, trace_blocks
from exitkit.networks.attach.heads import HeadChoice, HeadForm
from exitkit.networks.attach.modes import TrainingMode
from exitkit.networks.attach.split import Plan
from exitkit.networks.attach.trace import Traced, check_supported, other_inputs, trace
from exitkit.networks.attach.trial import Trial
from exitkit.networks.attach.values import Value
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.networks.copying import copied
from exitkit.networks.inputs import check_shape, reference_tensor
from exitkit.networks.placement import place as place_by_cost

MakeHead = Callable[[tuple[int, ...], int], Head]
"""(shape of one image's features, number of classes) -> head."""


class AttachedNetwork(MultiExitNetwork):
    """The cascade of a user's network.

    Its state is the tensor at the exit's point or, if later stages need more tensors, a tuple that begins with it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_without_old_constants)

    def view(self, state: Any) -> Tensor:
        """Return the tensor at the exit's point."""
        tensor: Tensor = state[0] if isinstance(state, tuple) else state
        return tensor

    def with_view(self, state: Any, tensor: Tensor) -> Any:
        """Return the state with the tensor at the exit's point replaced."""
        return (tensor, *state[1:]) if isinstance(state, tuple) else tensor


def _without_old_constants(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept weights of earlier releases, which held what depends on buffers only (index tables) as constants."""
    own = network.state_dict(prefix=prefix)
    old = [name for name in state if "_tensor_constant" in name and name not in own]
    for name in old:
        del state[name]
    for name, value in own.items() if old else ():
        if not value.is_floating_point():
            state.setdefault(name, value)


def attach_exits(
    model: nn.Module,
    at: Sequence[str] | Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    *,
    blocks: str | None = None,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    head: MakeHead | HeadChoice | HeadForm | None = None,
    check: bool = True,
) -> MultiExitNetwork:
    """Convert a classification network into a cascade, with exits after some of its points.

    The parameters are shared with `model`, and their names are prefixed by `stages.<i>.`; pass a deep copy to keep the
    model separate, and switch modes by the cascade's own `train` and `eval`. The last exit outputs the model's logits,
    bit for bit, in training and in evaluation, and changes the same buffers and attributes. Computations in training
    only, such as auxiliary classifiers, are left out. New heads pool the features and apply one linear layer.

    The model's forward is traced by torch.fx. A submodule whose forward does what a trace can't repeat is called as a
    whole, and is not cut inside: it counts, draws random numbers of Python, has control flow that depends on the
    images, has hooks, or is scripted. The model's own forward must not do such things.

    Args:
        model: any module images -> logits, on any device.
        at: points after which exits are placed, in order: names of nodes as `torchvision.models.feature_extraction`
            prints them (`layer2.0.relu`), or names of modules, meaning their last node (`layer2`). With `blocks`, the
            numbers of the blocks, from 0.
        fractions: instead of `at`, ascending shares of the multiply-adds between 0 and 1; each exit is placed at the
            point with the nearest cumulative share, among the points that a single tensor crosses (in a network of
            parallel branches: that as few tensors as possible cross).
        blocks: path of a list of blocks between which the network is cut, for networks that torch.fx can't trace; only
            the code around the blocks is recorded, and the result of `forward` may be an object with `logits`, as in
            transformers. `*` stands for any name (`encoder.stages.*.layers`). The network then accepts images of
            `input_shape` only.
        input_shape: (channels, height, width) of the images.
        head: the head of each new exit: a name (`linear` by default, `norm`, `class-token`, `sdn`, `msdnet`, `auto`),
            or a function that makes it from the shape of its features, without the batch, and the number of classes.
        check: compare the cascade with the model, by running copies of both on random images. Without it, a forward
            that depends on what torch.fx does not see (a global variable) is not noticed.

    Returns:
        a cascade of `len(at) + 1` exits. The state between two stages is the tensor at the point, or a tuple of it and
        all other tensors that later stages need (inside a residual block, the block's input).

    Raises:
        UserError: the network can't be traced (the message gives the line of its forward, and what to do), does not
            return logits, or is a wrapper of a network; a point is unknown, or the network can't be cut there (the
            message gives the nearest possible points); a head does not fit; or `at` and `fractions` are both given, or
            neither.
    """
    head = _chosen_head(head)
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if (at is None) == (fractions is None):
        raise UserError("exits are placed at named points or at shares of the cost; give one of at and fractions")
    at, fractions = _as_list("at", at), _as_list("fractions", fractions)
    check_shape(input_shape)
    check_supported(model)
    other_inputs(model)
    trial = Trial(model, input_shape) if check else None
    traced = _traced(model, blocks, input_shape, trial.changing if trial else set())
    plan = Plan(traced, model, input_shape)
    if blocks is not None:
        ends = ends_of_blocks(plan, block_paths(model, blocks))
        cuts = _numbered(ends, at) if at is not None else _at_ends(plan, ends, fractions or ())
    else:
        cuts = _named(plan, at) if at is not None else _by_cost(plan, fractions or ())
    classes = plan.values[plan.answer].shape[1]
    stages = plan.split(cuts)
    heads = [_head(plan.value(cut), classes, head, plan.name(cut), reference_tensor(model)) for cut in cuts]
    last = nn.Identity() if plan.tail is None else traced.parts[str(plan.tail.target)]
    network = AttachedNetwork(stages, [*heads, Head(nn.Identity(), last)], input_shape, classes)
    known = set(model.modules())
    for module in network.modules():
        if module not in known and not isinstance(module, TrainingMode):
            module.training = model.training
    if trial is not None:
        trial.compare(network, training=not traced.left_out)
    return network


def _as_list(name: str, values: Any) -> Any:
    """Return the values of `at` or `fractions`; an array as a list.

    Raises:
        UserError: they are no sequence.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    if values is not None and not isinstance(values, Sequence):
        example = {"at": "points, such as ['layer1', 'layer2']", "fractions": "shares, such as [0.25, 0.5]"}[name]
        raise UserError(f"{name} is {values!r}; expected a list of {example}")
    return values


def _chosen_head(head: MakeHead | HeadChoice | HeadForm | None) -> MakeHead | HeadChoice:
    """Return what makes the heads.

    Raises:
        UserError: it is neither a name nor a function.
    """
    if head is None or isinstance(head, str):
        return HeadChoice(head or "linear")
    if isinstance(head, nn.Module) or not (isinstance(head, HeadChoice) or callable(head)):
        what = f"a {type(head).__name__}, of one point" if isinstance(head, nn.Module) else repr(head)
        raise UserError(f"head is {what}; expected a name, or a function of (shape, classes) that makes each head")
    return head


def _traced(
    model: nn.Module, blocks: str | None, input_shape: tuple[int, int, int], changing: set[tuple[str, str]]
) -> Traced:
    """Return the network's graph; the error for one that torch.fx can't trace names the line that cuts it at blocks."""
    if blocks is not None:
        return trace_blocks(model, blocks, input_shape)
    try:
        return trace(model, changing)
    except UserError as error:
        known = find_blocks(model)
        if known is None:
            raise
        middle = len(block_paths(model, known)) // 2 - 1
        line = f"exitkit.attach_exits(model, blocks={known!r}, at=[{middle}], input_shape={input_shape})"
        raise UserError(f"{error}; or cut it between its blocks: {line}") from error


def _numbered(ends: list[int], at: Sequence[Any]) -> list[int]:
    """Return the places of blocks by number."""
    numbers = [number for number in at if isinstance(number, int) and 0 <= number < len(ends)]
    if not numbers or numbers != list(at) or numbers != sorted(set(numbers)):
        raise UserError(f"at is {at!r}; expected ascending numbers of blocks, from 0 to {len(ends) - 1}")
    return [ends[number] for number in numbers]


def _at_ends(plan: Plan, ends: list[int], fractions: Sequence[float]) -> list[int]:
    """Return the places among the ends of blocks with the nearest shares of the cost."""
    bounds = pairwise([-1, *ends, len(plan.nodes) - 1])
    costs = [sum(plan.value(place).macs for place in range(start + 1, stop + 1)) for start, stop in bounds]
    return [ends[unit] for unit in place_by_cost(costs, fractions)]


def _named(plan: Plan, at: Sequence[Any]) -> list[int]:
    if isinstance(at, str) or not at or not all(isinstance(point, str) for point in at):
        raise UserError(f"at is {at!r}; expected a list of points, such as ['layer1', 'layer2']")
    places = [plan.find(point) for point in at]
    for (first, first_place), (second, second_place) in pairwise(zip(at, places, strict=True)):
        if first_place == second_place:
            raise UserError(f"{first} and {second} are the same point of {plan.traced.name}; give each point once")
        if first_place > second_place:
            raise UserError(f"{second} comes before {first} in {plan.traced.name}; give the points in order")
    return places


def _by_cost(plan: Plan, fractions: Sequence[float]) -> list[int]:
    """Place exits at the end of a module or between outermost modules, where as few tensors cross as possible.

    The fewest tensors for which the fractions give different points: one, unless the network has parallel branches.

    Raises:
        UserError: the fractions give the same point, or are no shares.
    """
    most = max((len(plan.computed(place)) for place in plan.places), default=1)
    errors = []
    for count in range(1, most + 1):
        try:
            return _where_few_cross(plan, fractions, count)
        except UserError as error:
            errors.append(error)
    few = plan.why_few()
    raise UserError(f"{errors[0]} ({few})" if few else str(errors[0]))


def _where_few_cross(plan: Plan, fractions: Sequence[float], count: int) -> list[int]:
    """Place exits at points that at most `count` tensors cross.

    Points without multiply-adds between them (after normalisation, activation, pooling) form one unit. Its exit reads
    the last point at the end of the outermost module: the activation instead of the normalisation before it, and the
    output of a block instead of the first node of the next.
    """
    modules = {name for name, _ in plan.traced.outline.named_modules()}
    candidates = [
        place
        for place in plan.places
        if len(plan.computed(place)) <= count
        and len(plan.value(place).shape) <= 4
        and ((name := plan.name(place)) in modules or "." not in name)
    ]
    costs: list[int] = []
    units: list[list[int]] = []
    for start, stop in pairwise([-1, *candidates, len(plan.nodes) - 1]):
        cost = sum(plan.value(place).macs for place in range(start + 1, stop + 1))
        if cost or not units:
            costs.append(cost)
            units.append([])
        units[-1].append(stop)
    return [
        min(units[unit], key=lambda place: (plan.name(place).count("."), -place))
        for unit in place_by_cost(costs, fractions)
    ]


def _head(value: Value, classes: int, make: MakeHead | HeadChoice, point: str, like: Tensor) -> Head:
    with torch.device(like.device):
        if isinstance(make, HeadChoice):
            head = make.make(value.shape[1:], classes, _channel_axis(value), point)
        else:
            head = _checked(make(value.shape[1:], classes), value.shape, classes, point, like)
    return head.to(device=like.device, dtype=like.dtype)


def _checked(head: Head, shape: tuple[int, ...], classes: int, point: str, like: Tensor) -> Head:
    """Check a head that the caller has made, by running a copy of it on features of two images.

    Raises:
        UserError: it is no head, does not accept the features, returns no logits, or changes the features in place.
    """
    if not isinstance(head, Head):
        raise UserError(f"the head at {point} is a {type(head).__name__}; expected an exitkit.networks.Head")
    features = torch.zeros(shape, device=like.device, dtype=like.dtype)
    try:
        with torch.no_grad():
            logits = copied(head).to(like).eval()(features)
    except Exception as error:  # a user's module may raise any error
        reason = " ".join(str(error).split())
        raise UserError(f"the head at {point} does not accept features of shape {list(shape)} ({reason})") from error
    if logits.shape != (2, classes):
        raise UserError(f"the head at {point} returns logits of shape {list(logits.shape)}; expected [2, {classes}]")
    if features._version:
        raise UserError(f"the head at {point} changes features in place that later stages read; use inplace=False")
    return head


def _channel_axis(value: Value) -> int:
    """Return the dimension of the channels: the one that does not grow with the image.

    If there are several, the widest of them; if the network accepts no larger images, the conventional one, which is
    dimension 1 of maps and the last dimension of tokens.
    """
    shape = value.shape
    if value.wide is None or len(value.wide) != len(shape):
        return 1 if len(shape) == 4 else len(shape) - 1
    constant = [axis for axis in range(1, len(shape)) if value.wide[axis] == shape[axis]]
    return max(constant or [1], key=lambda axis: shape[axis])
