"""Trial runs: what the forward passes of a network change, and whether its cascade does exactly the same.

A copy of the network runs on random images several times, in its present mode, in training and in evaluation. Another
copy runs as the cascade, with the same random numbers. Outputs, parameters, buffers and all other attributes of the
modules have to be equal, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from exitkit.engine.randomness import seeded_everywhere
from exitkit.errors import UserError
from exitkit.networks.attach.recording import SUBMODULE, line_of_error, line_of_forward
from exitkit.networks.attach.values import refused_images, refused_output
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.compilation import eagerly
from exitkit.networks.copying import copied
from exitkit.networks.inputs import reference_tensor

MODES = ("present", "training", "training", "evaluation", "training", "evaluation")
"""The mode of each forward pass of a trial."""

Changes = set[tuple[str, str]]
"""{(path of a module, attribute)}."""


class Trial:
    """The forward passes of a copy of a network.

    Args:
        model: the network; neither it nor any random state changes.
        input_shape: (channels, height, width) of the images.

    Attributes:
        changing: the attributes, buffers and parameters that the passes changed.
        outputs: the results of the passes.

    Raises:
        UserError: the network can't be copied, does not accept such images, does not return logits, or makes new
            parameters in a forward pass.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self._model, self._shape = model, input_shape
        self._copy = copied(model)
        before = attributes(self._copy)
        parameters = dict(self._copy.named_parameters())
        self.changing: Changes = set()
        self.outputs: list[Any] = []
        try:
            for output in self._passes(self._copy, self._copy):
                self.outputs.append(output)
                self.changing |= changed(before, attributes(self._copy))
        except Exception as error:  # a user's forward may raise any error
            where = line_of_error(error.__traceback__)
            refused = refused_images(type(model).__name__, input_shape, error)
            raise UserError(f"{refused}; the error is raised at {where}" if where else str(refused)) from error
        if not isinstance(self.outputs[-1], Tensor):
            raise refused_output(type(model).__name__, self.outputs[-1])
        made = [name for name, _ in self._copy.named_parameters() if name not in parameters]
        if made:
            raise UserError(
                f"{type(model).__name__} makes {made[0]} in its first forward pass; run the model once on a batch of "
                "images, then attach the exits"
            )

    def _passes(self, model: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[Any]:
        """Yield the results of the passes; `model` is the module whose mode is set."""
        reference = reference_tensor(model)
        for seed, mode in enumerate(MODES):
            if mode != "present":
                model.train(mode == "training")
            with seeded_everywhere(reference.device, seed), torch.set_grad_enabled(model.training), eagerly():
                images = torch.rand(2, *self._shape).to(reference)
                result = forward(images)
                output = pytree.tree_map_only(Tensor, Tensor.detach, getattr(result, "logits", result))
            yield output

    def compare(self, network: MultiExitNetwork, *, training: bool = True) -> None:
        """Check that the cascade of the network does the same.

        Args:
            network: the cascade, which shares the modules of the network.
            training: whether to compare passes in training mode as well.

        Raises:
            UserError: it does not.
        """
        model, cascade = copied((self._model, network))
        passes = self._passes(cascade, _without_heads(cascade))
        for mode, expected, output in zip(MODES, self.outputs, passes, strict=True):
            if (training or mode == "evaluation") and not same_logits(output, expected):
                raise self._refuse(f"computes other logits than the network in {mode} mode")
        others = sorted(different(attributes(model), attributes(self._copy))) if training else []
        if others:
            raise self._refuse(f"leaves another {'.'.join(others[0]).lstrip('.')} than the network")

    def _refuse(self, what: str) -> UserError:
        return UserError(
            f"{type(self._model).__name__} can't be cut into stages: their chain {what}, so that its forward (at "
            f"{line_of_forward(self._model)}) does something that torch.fx does not record; {SUBMODULE}"
        )


def _without_heads(network: MultiExitNetwork) -> Callable[[Tensor], Tensor]:
    """Return the computation of the last exit without the heads of the others, which may draw random numbers."""

    def forward(images: Tensor) -> Tensor:
        state: Any = images
        for stage in network.stages:
            state = stage(state)
        logits: Tensor = network.heads[-1](network.view(state))
        return logits

    return forward


def same_logits(logits: Tensor, output: Any) -> bool:
    """Whether logits equal the output of a network, or one of the tensors in it; see `_equal`."""
    return any(_equal(logits, leaf) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal bit for bit, with NaN equal to NaN; on GPUs, whose sums vary, nearly equal."""
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta != other.is_meta:
        return False
    if one.is_cuda and one.is_floating_point():
        return torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)
    return one.is_meta or bool(((one == other) | ((one != one) & (other != other))).all())


# --- attributes


class _Held(NamedTuple):
    """A tensor, its version, and a copy of its values; None for parameters, whose versions are enough."""

    tensor: Tensor
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Held:
        version = 0 if tensor.is_inference() else tensor._version
        return cls(tensor, version, None if isinstance(tensor, nn.Parameter) else tensor.detach().clone())

    def is_same(self, other: _Held) -> bool:
        """Whether the tensor has neither been replaced nor changed."""
        unchanged = self.values is None or _equal(self.values, other.tensor.detach())
        return self.tensor is other.tensor and self.version == other.version and unchanged


_OWN = frozenset(vars(nn.Module()))


def attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Return all that the modules of a network hold, by path of the module and attribute, in comparable form."""
    held: dict[tuple[str, str], Any] = {}
    own = [(path, module) for path, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)]
    for path, module in own:
        values = {name: value for name, value in vars(module).items() if name not in _OWN}
        values |= dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
        held |= {(path, name): _frozen(value, 0) for name, value in values.items()}
    return held


def _frozen(value: Any, depth: int) -> Any:
    """Return a value in a form that does not change when the value does, and that is comparable between copies."""
    if isinstance(value, Tensor):
        return _Held.of(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if depth > _DEEPEST or isinstance(value, nn.Module | type | Callable | fx.Graph):
        return type(value)
    if isinstance(value, dict):
        return [(_frozen(key, depth + 1), _frozen(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [_frozen(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    try:
        return type(value), _frozen(value.__reduce_ex__(2)[1:3], depth + 1)
    except Exception:  # an object that can't be pickled
        return type(value)


_DEEPEST = 12


def changed(before: Mapping[tuple[str, str], Any], after: Mapping[tuple[str, str], Any]) -> Changes:
    """Return what differs between two results of `attributes` for the same network."""
    return {key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key), _Held.is_same)}


def different(one: Mapping[tuple[str, str], Any], other: Mapping[tuple[str, str], Any]) -> Changes:
    """Return what differs in value between the attributes of two copies of a network."""

    def equal(a: _Held, b: _Held) -> bool:
        return _equal(a.tensor.detach(), b.tensor.detach())

    return {key for key in one.keys() | other.keys() if not _same(one.get(key), other.get(key), equal)}


def _same(one: Any, other: Any, equal: Callable[[_Held, _Held], bool]) -> bool:
    if isinstance(one, _Held) and isinstance(other, _Held):
        return equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b, equal) for a, b in zip(one, other, strict=True))
    return bool(one == other)
