"""Weights of the authors' releases, brought onto our networks by name.

A family's `Layout` (released_layouts.py) says how the authors' code names what we name otherwise; a method that puts a
link into the network says by `TrainingStrategy.released_names` how its own files name that. Shapes are checked, every
tensor of the network has to be found, and until all are, none is changed.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from exitkit.errors import UserError
from exitkit.files import load_tensors
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.released.layouts import LAYOUTS, begun_anew


class NamesReleased(Protocol):
    """What this needs of a method; `TrainingStrategy` has it."""

    def released_names(self) -> Mapping[str, str]:
        """Return {regular expression: replacement} of the names of what the method puts into the network."""


WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network")
"""Where released files hide the tensors: `{"state_dict": {"model": {...}}, "epoch": ...}` and the like."""

_SHOWN = 3


class ReleasedFit(NamedTuple):
    """What came of a released file.

    Attributes:
        loaded: how many tensors of the network were filled.
        unused: the file's names of the tensors that have no place in the network.
    """

    loaded: int
    unused: list[str]


def load_released_weights(
    network: MultiExitNetwork, state_dict: Mapping[str, Any], strategy: NamesReleased | None = None
) -> ReleasedFit:
    """Load the authors' weights into a network of ours, all of them or (on an error) none.

    Args:
        network: a network of the same structure, adapted by `strategy` if its link has tensors of its own.
        state_dict: tensors by the authors' names, in whatever their file wraps them: `{"state_dict": {...}}`,
            `{"state_dict": {"model": {...}}}`, names that begin with `module.`.
        strategy: the method whose files these are, where they name things of their own (IMTA's second phase).

    Returns:
        how many tensors were loaded, and what of the file has no place. Old files don't count batches in batch
        normalisation (`num_batches_tracked`); the network's counts then stay.

    Raises:
        UserError: a family without a known release, no tensors, or any tensor of the network that the file lacks or
            has in another shape.
    """
    tensors = released_tensors(state_dict)
    names = _released_names(network, strategy)
    fitted: dict[str, Tensor] = {}
    misfits: list[str] = []
    for name, value in network.state_dict().items():
        theirs = names[name]
        if theirs in tensors:
            tensor = _shaped(tensors[theirs].tensor, value)
            if tensor.shape == value.shape:
                fitted[name] = tensor
                continue
        elif name.endswith("num_batches_tracked"):
            continue
        misfits.append(name)
    if misfits:
        ours = network.state_dict()
        shown = "; ".join(_complaint(name, ours[name], names[name], tensors) for name in misfits[:_SHOWN])
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        raise UserError(
            f"{len(misfits)} of the network's {len(names)} tensors can't be filled from the file: {shown}{more}"
        )
    network.load_state_dict(fitted, strict=False)
    used = {names[name] for name in fitted}
    return ReleasedFit(len(fitted), [held.name for bare, held in tensors.items() if bare not in used])


def released_classes(
    network: MultiExitNetwork, state_dict: Mapping[str, Any], strategy: NamesReleased | None = None
) -> int | None:
    """Return how many classes a released file's last head tells apart, or None if it has no such head.

    Args:
        network: a network of the same structure, with any number of classes; its tensors may lie on `meta`.
        state_dict: as for `load_released_weights`.
        strategy: as for `load_released_weights`.
    """
    names = _released_names(network, strategy)
    last = [theirs for ours, theirs in names.items() if ours.startswith(f"heads.{network.num_exits - 1}.classify.")]
    held = [tensor.tensor for name, tensor in released_tensors(state_dict).items() if name in last]
    return held[-1].shape[0] if held and held[-1].ndim else None


class _Held(NamedTuple):
    """A tensor of a file, and its name there."""

    name: str
    tensor: Tensor


def released_tensors(content: Any) -> dict[str, _Held]:
    """Return the network's tensors in a released file, by their names without `module.`.

    Raises:
        UserError: there are none.
    """
    wrapped = content
    for _ in range(len(WRAPPERS)):
        inner = [content[key] for key in WRAPPERS if isinstance(content, Mapping) and key in content]
        content = next((each for each in inner if isinstance(each, Mapping)), content)
    held = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        re.sub(r"(^|\.)(module\.)+", r"\1", name): _Held(name, tensor)
        for name, tensor in held
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        keys = f" with {', '.join(map(str, list(wrapped)[:5]))}" if isinstance(wrapped, Mapping) else ""
        raise UserError(
            f"no tensors by name were found in a {type(wrapped).__name__}{keys}; expected a state dict, bare or as "
            f"{' or '.join(WRAPPERS[:2])} of the file"
        )
    return tensors


def _released_names(network: MultiExitNetwork, strategy: NamesReleased | None) -> dict[str, str]:
    if network.family not in LAYOUTS:
        raise UserError(
            f"no released files are known for networks of the family {network.family!r}; there are some for "
            f"{', '.join(sorted(LAYOUTS))}"
        )
    names = LAYOUTS[network.family].names(network)
    rules = tuple(strategy.released_names().items()) if strategy else ()
    return {ours: begun_anew(theirs, rules) for ours, theirs in names.items()}


def _shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a scalar in the scalar shape of `like` ([] or [1]), and anything else as it is."""
    scalars = tensor.numel() == like.numel() == 1 and max(tensor.ndim, like.ndim) <= 1
    return tensor.reshape(like.shape) if scalars else tensor


def _complaint(name: str, value: Tensor, theirs: str, tensors: Mapping[str, _Held]) -> str:
    expected = f"{name} {list(value.shape)}"
    if theirs in tensors:
        held = tensors[theirs]
        return f"{expected} is {held.name} there, of shape {list(held.tensor.shape)}"
    near = get_close_matches(theirs, tensors, n=1)
    nearest = f" (nearest: {tensors[near[0]].name} {list(tensors[near[0]].tensor.shape)})" if near else ""
    return f"{expected} would be {theirs} there, which is missing{nearest}"


def read_released_file(path: Path) -> Mapping[str, Any]:
    """Read a released file, a pickle (`.pth`, `.pt`, `.pth.tar`) or `.safetensors`; nothing in it is run.

    Raises:
        UserError: it is missing, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; expected a file of released weights")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch thinks of a foreign pickle, before it refuses it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
        if refused is None:
            raise _damaged(path, error) from None
        raise UserError(
            f"{path} holds more than tensors ({refused[1]}), and nothing in it was run; where you trust the file, save "
            f"its tensors alone: torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pth')"
        ) from None
    except Exception as error:  # torch raises many kinds for a file that is not what it should be
        raise _damaged(path, error) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a state dict, or a checkpoint with one")
    return content


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return UserError(f"{path} is damaged or no file of weights ({type(error).__name__}: {reason[:120]})")
