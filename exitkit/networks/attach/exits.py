"""Exits on any network: a user's classifier cut at named points, or at shares of its cost, into a cascade.

The stages are pieces of the network's torch.fx graph. They hold the network's own modules and parameters, not copies:
pretrained weights stay, and training the cascade trains the network that it was made from.
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
"""(shape of one image's features, classes) -> head."""


class AttachedNetwork(MultiExitNetwork):
    """The cascade of a user's network.

    Its state is the tensor at the exit's point, or, where more is alive there, a tuple that begins with it.
    """

    def view(self, state: Any) -> Tensor:
        """Return the tensor at the exit's point."""
        tensor: Tensor = state[0] if isinstance(state, tuple) else state
        return tensor

    def with_view(self, state: Any, tensor: Tensor) -> Any:
        """Return the state with that tensor replaced."""
        return (tensor, *state[1:]) if isinstance(state, tuple) else tensor


class Pooled(nn.Module):
    """The mean of features over everything but their channels: [B, ..., C, ...] -> [B, C].

    Args:
        axis: dimension of the channels.
        dims: number of dimensions, the batch included.
    """

    def __init__(self, axis: int, dims: int) -> None:
        super().__init__()
        self.over = [dim for dim in range(1, dims) if dim != axis]

    def forward(self, x: Tensor) -> Tensor:
        """Pool x."""
        return x.mean(self.over) if self.over else x

    def extra_repr(self) -> str:
        """Show what is averaged."""
        return f"over={self.over}"


def attach_exits(
    model: nn.Module,
    at: Sequence[str] | None = None,
    fractions: Sequence[float] | None = None,
    *,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    head: MakeHead | None = None,
) -> MultiExitNetwork:
    """Turn a classification network into a cascade with exits behind some of its points.

    The parameters are shared with `model`, under their own names behind `stages.<i>.`; pass a deep copy to keep the
    model apart, and use the cascade's own `train` and `eval`. The last exit is the model itself and gives its logits,
    bit for bit; what a model computes in training only, such as auxiliary classifiers, is left out. New heads pool
    the features and end in one linear layer.

    Args:
        model: any module images -> logits that torch.fx can trace, on any device.
        at: points behind which exits stand, in order: names as `torchvision.models.feature_extraction` prints them
            (`layer2.0.relu`), or of a module, meaning its last node (`layer2`).
        fractions: instead, shares of the multiply-adds between 0 and 1, ascending; each exit stands where the share so
            far is nearest, among all points that a single tensor crosses.
        input_shape: (channels, height, width) of the images.
        head: makes the head of a new exit from its features' shape, the batch left out, and the number of classes.

    Returns:
        a cascade of `len(at) + 1` exits. Between stages goes the tensor at the point, or a tuple of it and of all else
        that is alive there (inside a residual block, its input).

    Raises:
        UserError: a network that can't be traced or does not give logits; unknown points, or such where it can't be
            cut (the nearest ones where it can are named); not exactly one of `at` and `fractions`.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if (at is None) == (fractions is None):
        raise UserError("exits stand either at named points or at shares of the cost; give one of at and fractions")
    traced = trace(model)
    plan = Plan(traced, input_shape)
    cuts = _named(plan, at) if at is not None else _by_cost(plan, fractions or ())
    classes = plan.values[plan.answer].shape[1]
    stages = plan.split(cuts)
    heads = [_head(plan.value(cut), classes, head, plan.name(cut), _reference(model)) for cut in cuts]
    last = nn.Identity() if plan.tail is None else traced.parts[str(plan.tail.target)]
    network = AttachedNetwork(stages, [*heads, Head(nn.Identity(), last)], input_shape, classes)
    theirs = set(model.modules())
    for module in network.modules():
        if module not in theirs:
            module.training = model.training
    return network


def _named(plan: Plan, at: Sequence[str]) -> list[int]:
    if isinstance(at, str) or not at:
        raise UserError(f"at is {at!r}; expected a list of points, such as ['layer1', 'layer2']")
    places = [plan.find(point) for point in at]
    for (first, one), (second, other) in pairwise(zip(at, places, strict=True)):
        if one == other:
            raise UserError(f"{first} and {second} are one point of {plan.traced.name}; an exit needs one of its own")
        if one > other:
            raise UserError(f"{second} comes before {first} in {plan.traced.name}; give the points in order")
    return places


def _by_cost(plan: Plan, fractions: Sequence[float]) -> list[int]:
    """Place exits among the points that one tensor crosses, at a module's end or between the outermost modules.

    Points with no multiply-adds between them (normalised, activated, pooled) are one unit, whose exit reads the last
    one that ends the outermost module: an activation, not the norm before it; a block, not what opens the next.
    """
    modules = {name for name, _ in plan.traced.ghost.named_modules()}
    clean = [
        place
        for place in plan.places
        if len(plan.crossing(place)) == 1
        and len(plan.value(place).shape) <= 4
        and ((name := plan.name(place)) in modules or "." not in name)
    ]
    costs: list[int] = []
    units: list[list[int]] = []
    for start, stop in pairwise([-1, *clean, len(plan.nodes) - 1]):
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
    """Return a tensor that has the device and number format of the network."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _head(value: Value, classes: int, make: MakeHead | None, point: str, like: Tensor) -> Head:
    with torch.device(like.device):
        if make is not None:
            head = make(value.shape[1:], classes)
        elif len(value.shape) > 4:
            raise UserError(f"the features at {point} have shape {value.shape[1:]}; give a head that reads them")
        else:
            axis = _channel_axis(value)
            pool = Pooled(axis, len(value.shape)) if len(value.shape) > 2 else nn.Identity()
            head = Head(pool, nn.Linear(value.shape[axis], classes))
    return head.to(device=like.device, dtype=like.dtype)


def _channel_axis(value: Value) -> int:
    """Return the dimension of the channels: the one that does not grow with the image.

    Where that leaves a choice it is the widest one; where the network takes no larger images, the usual one, which is
    dimension 1 of maps and the last of tokens.
    """
    shape = value.shape
    if value.wide is None or len(value.wide) != len(shape):
        return 1 if len(shape) == 4 else len(shape) - 1
    still = [axis for axis in range(1, len(shape)) if value.wide[axis] == shape[axis]]
    return max(still or [1], key=lambda axis: shape[axis])
