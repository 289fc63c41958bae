"""Exportable parts of a cascade: one program per stage with its head, from tensors to tensors."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from exitkit.errors import UserError
from exitkit.files import written_whole
from exitkit.networks.cascade import MultiExitNetwork

Format = Literal["onnx", "torch-export"]
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
OPSET = 20
"""Version of ONNX's operators; the oldest supported onnxruntime knows it."""


class Piece(NamedTuple):
    """A part that is exported as one program.

    Attributes:
        module: tensors -> tensors, of any batch size.
        inputs: example inputs.
        names: names of the inputs, and of the outputs.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[tuple[str, ...], tuple[str, ...]]


class _Step(nn.Module):
    """One stage with its head: tensors of state and carry -> the exit's logits, then the tensors for the next stage.

    Args:
        network: the network.
        index: the stage, from 0.
        example: (state, carry) before the stage.
    """

    def __init__(self, network: MultiExitNetwork, index: int, example: tuple[Any, Any]) -> None:
        super().__init__()
        self.network, self.index = network, index
        self.leaves, self.structure = pytree.tree_flatten(pytree.tree_map_only(Tensor, lambda _: Tensor, example))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the stage."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is Tensor else leaf for leaf in self.leaves]
        state, carry = pytree.tree_unflatten(leaves, self.structure)
        output, *after = self.network.step(self.index, state, carry)
        # Each output of a program has its own name, which one tensor can't have twice; so they are cloned.
        following = () if self.index == self.network.num_exits - 1 else _tensors(after)
        return (output.logits, *(tensor.clone() for tensor in following))


class _AllExits(nn.Module):
    """Images -> the logits of all exits."""

    def __init__(self, network: MultiExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Run the whole network on the one input."""
        logits: tuple[Tensor, ...] = self.network(*images).logits
        return tuple(tensor.clone() for tensor in logits)


def without_taps(network: MultiExitNetwork) -> MultiExitNetwork:
    """Return the network in evaluation mode, without gradient taps."""
    bare = copy.copy(network)
    bare.taps = []
    return bare.eval()


def all_exits(network: MultiExitNetwork, images: Tensor) -> Piece:
    """Return the whole network as one program."""
    names = tuple(f"logits_{number}" for number in range(1, network.num_exits + 1))
    return Piece(_AllExits(network), (images,), (("images",), names))


@torch.no_grad()
def pieces(network: MultiExitNetwork, images: Tensor) -> Iterator[Piece]:
    """Yield the program of each stage with its head; its inputs are the outputs of the one before except the logits."""
    example: tuple[Any, Any] = (images, None)
    for index in range(network.num_exits):
        module, inputs = _Step(network, index, example), _tensors(example)
        _, *after = network.step(index, *example)
        example = (after[0], after[1])
        outputs = () if index == network.num_exits - 1 else _names(index + 1, len(_tensors(example)))
        names = ("images",) if index == 0 else _names(index, len(inputs))
        yield Piece(module, inputs, (names, (f"logits_{index + 1}", *outputs)))


def _names(stage: int, count: int) -> tuple[str, ...]:
    return tuple(f"state_{stage}_{number}" for number in range(count))


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def missing_packages() -> list[str]:
    """Return the packages that `onnx` programs need and that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def exported(piece: Piece, name: str) -> ExportedProgram:
    """Return a piece as a program of torch.export, for any batch size.

    Args:
        piece: the piece.
        name: what the error calls it.

    Raises:
        UserError: torch can't export it.
    """
    sizes: Any = {0: torch.export.Dim("batch", min=1)}
    with _quiet(), _one_error(f"torch can't export {name}"), torch.no_grad():
        return torch.export.export(piece.module, piece.inputs, dynamic_shapes=((sizes,) * len(piece.inputs),))


def write_program(piece: Piece, path: Path, form: Format) -> None:
    """Write a piece as one program, for any batch size.

    Raises:
        UserError: torch can't export it.
    """
    program = exported(piece, path.stem)
    if form == "torch-export":
        # Into memory first: torch ends the process if the disk is full.
        content = BytesIO()
        torch.export.save(program, content)
        _write(path, content.getvalue())
        return
    inputs, outputs = piece.names
    with _quiet(), _one_error(f"torch can't export {path.stem} as onnx"):
        converted = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert converted is not None
        content_of_file = converted.model_proto.SerializeToString()
    _write(path, content_of_file)


def _write(path: Path, content: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of torch's exporters, which do not concern the user of exitkit."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Turn the errors of torch's tracer and converter, which are of many types, into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: {type(error).__name__}: {reason}") from error
