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
from exitkit.networks.attach.split import Plan
from exitkit.networks.attach.trace import Value, trace
from exitkit.networks.cascade import Head, MultiExitNetwork
from exitkit.networks.placement import place as place_by_cost

MakeHead = Callable[[tuple[int, ...], int], Head]
"""(shape of one image's features, number of classes) -> head."""


class AttachedNetwork(MultiExitNetwork):
    """The cascade of a user's network.

    Its state is the tensor at the exit's point or, if later stages need more tensors, a tuple that begins with it.
    """

    def view(self, state: Any) -> Tensor:
        """Return the tensor at the exit's point."""
        tensor: Tensor = state[0] if isinstance(state, tuple) else state
        return tensor

    def with_view(self, state: Any, tensor: Tensor) -> Any:
        """Return the state with the tensor at the exit's point replaced."""
        return (tensor, *state[1:]) if isinstance(state, tuple) else tensor


class Pooled(nn.Module):
    """Mean over all dimensions but the batch and the channels: [B, ..., C, ...] -> [B, C].

    Args:
        axis: dimension of the channels.
        dims: number of dimensions, the batch included.
    """

    def __init__(self, axis: int, dims: int) -> None:
        super().__init__()
        self.over = [dim for dim in range(1, dims) if dim != axis]

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of x."""
        return x.mean(self.over) if self.over else x

    def extra_repr(self) -> str:
        """Return the averaged dimensions."""
        return f"over={self.over}"


def attach_exits(
    model: nn.Module,
    at: Sequence[str] | None = None,
    fractions: Sequence[float] | None = None,
    *,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    head: MakeHead | None = None,
) -> MultiExitNetwork:
    """Convert a classification network into a cascade, with exits after some of its points.

    The parameters are shared with `model`, and their names are prefixed by `stages.<i>.`; pass a deep copy to keep the
    model separate, and switch modes by the cascade's own `train` and `eval`. The last exit outputs the model's logits,
    bit for bit. Computations in training only, such as auxiliary classifiers, are left out. New heads pool the features
    and apply one linear layer.

    Args:
        model: any module images -> logits that torch.fx can trace, on any device.
        at: points after which exits are placed, in order: names of nodes as `torchvision.models.feature_extraction`
            prints them (`layer2.0.relu`), or names of modules, meaning their last node (`layer2`).
        fractions: instead of `at`, ascending shares of the multiply-adds between 0 and 1; each exit is placed at the
            point with the nearest cumulative share, among the points that a single tensor crosses.
        input_shape: (channels, height, width) of the images.
        head: makes the head of a new exit from the shape of its features, without the batch, and the number of classes.

    Returns:
        a cascade of `len(at) + 1` exits. The state between two stages is the tensor at the point, or a tuple of it and
        all other tensors that later stages need (inside a residual block, the block's input).

    Raises:
        UserError: the network can't be traced or does not return logits; a point is unknown, or the network can't be
            cut there (the message gives the nearest possible points); or `at` and `fractions` are both given, or
            neither.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if (at is None) == (fractions is None):
        raise UserError("exits are placed at named points or at shares of the cost; give one of at and fractions")
    traced = trace(model)
    plan = Plan(traced, input_shape)
    cuts = _named(plan, at) if at is not None else _by_cost(plan, fractions or ())
    classes = plan.values[plan.answer].shape[1]
    stages = plan.split(cuts)
    heads = [_head(plan.value(cut), classes, head, plan.name(cut), _reference(model)) for cut in cuts]
    last = nn.Identity() if plan.tail is None else traced.parts[str(plan.tail.target)]
    network = AttachedNetwork(stages, [*heads, Head(nn.Identity(), last)], input_shape, classes)
    model_modules = set(model.modules())
    for module in network.modules():
        if module not in model_modules:
            module.training = model.training
    return network


def _named(plan: Plan, at: Sequence[str]) -> list[int]:
    if isinstance(at, str) or not at:
        raise UserError(f"at is {at!r}; expected a list of points, such as ['layer1', 'layer2']")
    places = [plan.find(point) for point in at]
    for (first, first_place), (second, second_place) in pairwise(zip(at, places, strict=True)):
        if first_place == second_place:
            raise UserError(f"{first} and {second} are the same point of {plan.traced.name}; give each point once")
        if first_place > second_place:
            raise UserError(f"{second} comes before {first} in {plan.traced.name}; give the points in order")
    return places


def _by_cost(plan: Plan, fractions: Sequence[float]) -> list[int]:
    """Place exits at points that one tensor crosses, at the end of a module or between outermost modules.

    Points without multiply-adds between them (after normalisation, activation, pooling) form one unit. Its exit reads
    the last point at the end of the outermost module: the activation instead of the normalisation before it, and the
    output of a block instead of the first node of the next.
    """
    modules = {name for name, _ in plan.traced.meta_copy.named_modules()}
    candidates = [
        place
        for place in plan.places
        if len(plan.crossing(place)) == 1
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


def _reference(model: nn.Module) -> Tensor:
    """Return a tensor with the device and dtype of the network."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _head(value: Value, classes: int, make: MakeHead | None, point: str, like: Tensor) -> Head:
    with torch.device(like.device):
        if make is not None:
            head = make(value.shape[1:], classes)
        elif len(value.shape) > 4:
            raise UserError(f"the features at {point} have shape {value.shape[1:]}; give a head for them by head=...")
        else:
            axis = _channel_axis(value)
            pool = Pooled(axis, len(value.shape)) if len(value.shape) > 2 else nn.Identity()
            head = Head(pool, nn.Linear(value.shape[axis], classes))
    return head.to(device=like.device, dtype=like.dtype)


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
