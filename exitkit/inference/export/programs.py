"""A cascade in pieces that can be exported: one program a stage and head, tensors in and tensors out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from exitkit.networks.cascade import MultiExitNetwork


class Piece(NamedTuple):
    """What is exported as one program.

    Attributes:
        module: tensors -> tensors, of whatever batch.
        inputs: an example of what it reads.
        names: of these, and of what it gives.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[tuple[str, ...], tuple[str, ...]]


class _Step(nn.Module):
    """One stage with its head: flat tensors of state and carry -> the exit's logits, then those of the next stage.

    Args:
        network, index: which stage.
        given: an example of (state, carry) before it.
    """

    def __init__(self, network: MultiExitNetwork, index: int, given: tuple[Any, Any]) -> None:
        super().__init__()
        self.network, self.index = network, index
        self.leaves, self.structure = pytree.tree_flatten(pytree.tree_map_only(Tensor, lambda _: Tensor, given))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the stage."""
        following = iter(tensors)
        leaves = [next(following) if leaf is Tensor else leaf for leaf in self.leaves]
        state, carry = pytree.tree_unflatten(leaves, self.structure)
        output, *given = self.network.step(self.index, state, carry)
        # A program's results are told apart by name, so that one tensor can't be two of them.
        onward = () if self.index == self.network.num_exits - 1 else _tensors(given)
        return (output.logits, *(tensor.clone() for tensor in onward))


class _AllExits(nn.Module):
    """Images -> the logits of all exits."""

    def __init__(self, network: MultiExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Run the whole network; the one input is given as every piece's are."""
        logits: tuple[Tensor, ...] = self.network(*images).logits
        return tuple(tensor.clone() for tensor in logits)


def without_taps(network: MultiExitNetwork) -> MultiExitNetwork:
    """Return the network as it answers: what changes gradients only is left out."""
    bare = copy.copy(network)
    bare.taps = []
    return bare.eval()


def all_exits(network: MultiExitNetwork, images: Tensor) -> Piece:
    """Return the whole network as one program."""
    names = tuple(f"logits_{number}" for number in range(1, network.num_exits + 1))
    return Piece(_AllExits(network), (images,), (("images",), names))


@torch.no_grad()
def pieces(network: MultiExitNetwork, images: Tensor) -> Iterator[Piece]:
    """Yield the program of each stage and head; each reads, in order, what the one before gives behind its logits."""
    given: tuple[Any, Any] = (images, None)
    for index in range(network.num_exits):
        module, inputs = _Step(network, index, given), _tensors(given)
        _, *after = network.step(index, *given)
        given = (after[0], after[1])
        outputs = () if index == network.num_exits - 1 else _names(index + 1, len(_tensors(given)))
        names = ("images",) if index == 0 else _names(index, len(inputs))
        yield Piece(module, inputs, (names, (f"logits_{index + 1}", *outputs)))


def _names(stage: int, count: int) -> tuple[str, ...]:
    return tuple(f"state_{stage}_{number}" for number in range(count))


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
