"""Exits on any network: a traced classifier, cut at named points, with a head at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from exitkit.backbones.graph_split import Graph, Shape
from exitkit.backbones.placement import place
from exitkit.errors import UserError
from exitkit.network import Head, MultiExitNetwork

NEAR = 0.05
"""A share of the cost by which an exit may miss its place, if a block ends there."""

MakeHead = Callable[[Shape, int], Head]
"""What makes a head from the shape that it reads (without the batch) and the number of classes."""


class Average(nn.Module):
    """The mean over all but the channels: [B, ...] -> [B, C]."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean."""
        return x.mean(self.dims)


class AttachedNetwork(MultiExitNetwork):
    """The cascade of a user's network: its state is the tensor at the cut, or a tuple of it and what else crosses."""

    def view(self, state: Any) -> Tensor:
        """Return the tensor at the cut."""
        tensor: Tensor = state[0] if isinstance(state, tuple) else state
        return tensor

    def with_view(self, state: Any, tensor: Tensor) -> Any:
        """Return the state with the tensor at the cut replaced."""
        return (tensor, *state[1:]) if isinstance(state, tuple) else tensor


def attach_exits(
    model: nn.Module,
    at: Sequence[str] | None = None,
    fractions: Sequence[float] | None = None,
    *,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    head: MakeHead | None = None,
) -> MultiExitNetwork:
    """Turn a classifier into a cascade, with an exit at each of some points and its own end as the last.

    The cascade shares the model's parameters: training the one trains the other. The graph is traced in evaluation
    mode; layers keep both modes, and only what the model's own code asks of `self.training` is fixed.

    Args:
        model: any network images [B, *input_shape] -> logits [B, C] that `torch.fx` can trace.
        at: points behind which exits stand, by the names of torchvision's feature extraction (`layer2.0.relu_1`); a
            prefix (`layer2`) means its last point.
        fractions: instead of `at`: shares of the model's multiply-adds; an exit stands at the nearest point that a
            single tensor crosses.
        input_shape: (channels, height, width) of an image.
        head: makes a head from what it reads, `head(shape, num_classes)` with `shape` as of one image; by default the
            mean over all positions and a linear layer.

    Returns:
        a cascade whose last exit gives the model's own logits.

    Raises:
        UserError: a point that is unknown or where the graph can't be cut (the nearest are given), shares that fit no
            point, or a model that can't be traced.
    """
    if (at is None) == (fractions is None):
        raise UserError("at and fractions both say where the exits stand; give one of them")
    graph = Graph(model, input_shape)
    if at is not None:
        if isinstance(at, str) or not at:
            raise UserError(f"at is {at!r}; expected a list of points such as ['layer1', 'layer2']")
        points = sorted((graph.find(name) for name in at), key=graph.place.__getitem__)
        if len(set(points)) < len(points):
            raise UserError(f"at names a point twice: {', '.join(at)}")
    else:
        points = _at_shares(graph, fractions or ())
    starts = [None, *points]
    ends = [*points, graph.before_last()]
    stages, heads = [], []
    for start, end in zip(starts, ends, strict=True):
        last = end is ends[-1]
        stages.append(graph.piece(start, end, [end] if last else graph.live(end)))
        if last:
            heads.append(Head(nn.Identity(), graph.last_linear() or nn.Identity()))
        elif head is not None:
            shape = graph.values[end].shape
            assert shape is not None  # the graph can be cut here
            heads.append(head(shape, graph.num_classes))
        else:
            heads.append(_plain_head(graph, end))
    reference = next(model.parameters())
    network = AttachedNetwork(stages, heads, input_shape, graph.num_classes, family="attached")
    network.heads.to(device=reference.device, dtype=reference.dtype)
    return network.train(model.training)


def _at_shares(graph: Graph, fractions: Sequence[float]) -> list[Any]:
    """Return the points at shares of the cost.

    Ends of whole blocks are preferred: points inside them are looked at only while some share is missed by more than
    `NEAR`.
    """
    whole = graph.values[graph.answer].cost
    found: list[tuple[float, list[Any]]] = []
    refusal: UserError | None = None
    for depth in range(1 + max(graph.depths.values())):
        candidates = graph.clean_points(depth)
        behind = [*(graph.values[node].cost for node in candidates), whole]
        try:
            places = place([after - before for before, after in pairwise([0, *behind])], fractions)
        except UserError as error:
            refusal = error
            continue
        missed = max(abs(behind[index] / whole - share) for index, share in zip(places, fractions, strict=True))
        found.append((missed, [candidates[index] for index in places]))
        if missed <= NEAR:
            break
    if not found:
        assert refusal is not None  # each depth was either found or refused
        raise refusal
    return min(found, key=lambda each: each[0])[1]


def _plain_head(graph: Graph, point: Any) -> Head:
    value = graph.values[point]
    assert value.shape is not None  # the graph can be cut here
    others = tuple(dim for dim in range(1, len(value.shape) + 1) if dim != value.channels)
    pool: nn.Module = Average(others) if others else nn.Identity()
    return Head(pool, nn.Linear(value.shape[value.channels - 1], graph.num_classes))
