"""Reading of files of weights, and loading of the authors' released weights, by the names of the tensors.

A family's `Layout` (layouts.py) maps exitkit's names to those in the authors' files; a method that sets a logit link
maps the link's names by `TrainingStrategy.released_names`. A file may also have exitkit's own names. Shapes are
checked, and the network changes only if the file has all of its tensors.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from exitkit.errors import UserError
from exitkit.escaping import counted
from exitkit.files import load_tensors
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.released.layouts import LAYOUTS, replace_prefix


class NamesReleased(Protocol):
    """Interface of a method for loading its released weights; `TrainingStrategy` implements it."""

    def released_names(self) -> Mapping[str, str]:
        """Return {regular expression: replacement} for the names of the tensors that the method adds."""


WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "network")
"""Keys under which released files nest the tensors: `{"state_dict": {"model": {...}}, "epoch": ...}` and the like."""

_SHOWN = 3


class ReleasedFit(NamedTuple):
    """Result of loading a released file.

    Attributes:
        loaded: number of tensors that were loaded into the network.
        unused: names of the file's tensors that the network does not have.
    """

    loaded: int
    unused: list[str]


def load_released_weights(
    network: MultiExitNetwork, state_dict: Mapping[str, Any], strategy: NamesReleased | None = None
) -> ReleasedFit:
    """Load the authors' weights into a network: all tensors or, on an error, none.

    Args:
        network: a network of the released structure, adapted by `strategy` if the method's link has tensors.
        state_dict: content of the file: tensors by the authors' names or by exitkit's, which may be nested
            (`{"state_dict": {...}}`, `{"state_dict": {"model": {...}}}`) and may begin with `module.` or `_orig_mod.`.
        strategy: method of the file, needed if the file has tensors of the method's link (IMTA's second phase).

    Returns:
        the number of loaded tensors, and the names of unused ones. Old files lack batch normalisation's
        `num_batches_tracked`; the network then keeps its own.

    Raises:
        UserError: the family has no known release, the file has no tensors, or a tensor of the network is missing
            from it or has another shape.
    """
    tensors = released_tensors(state_dict)
    names = _names_in_file(network, strategy, tensors)
    fitted: dict[str, Tensor] = {}
    misfits: list[str] = []
    for name, value in network.state_dict().items():
        file_name = names[name]
        if file_name in tensors:
            tensor = _shaped(tensors[file_name].tensor, value)
            if tensor.shape == value.shape:
                fitted[name] = tensor
                continue
        elif name.endswith("num_batches_tracked"):
            continue
        misfits.append(name)
    if misfits:
        state = network.state_dict()
        shown = "; ".join(_describe_misfit(name, state[name], names[name], tensors) for name in misfits[:_SHOWN])
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        raise UserError(
            f"{len(misfits)} of the network's {len(names)} tensors can't be filled from the file: {shown}{more}"
        )
    network.load_state_dict(fitted, strict=False)
    used = {names[name] for name in fitted}
    return ReleasedFit(len(fitted), [entry.name for bare, entry in tensors.items() if bare not in used])


def released_classes(
    network: MultiExitNetwork, state_dict: Mapping[str, Any], strategy: NamesReleased | None = None
) -> int | None:
    """Return the number of classes of the last head in a released file, or None if the file has no such head.

    Args:
        network: a network of the released structure, with any number of classes; it may be on the `meta` device.
        state_dict: as for `load_released_weights`.
        strategy: as for `load_released_weights`.
    """
    tensors = released_tensors(state_dict)
    names = _names_in_file(network, strategy, tensors)
    prefix = f"heads.{network.num_exits - 1}.classify."
    last = [file_name for name, file_name in names.items() if name.startswith(prefix)]
    found = [entry.tensor for name, entry in tensors.items() if name in last]
    return found[-1].shape[0] if found and found[-1].ndim else None


class _FileTensor(NamedTuple):
    """A tensor of a file, and its name in the file."""

    name: str
    tensor: Tensor


def own_tensors(network: MultiExitNetwork, content: Any) -> dict[str, Tensor]:
    """Return the tensors of a file by the names of a network, where they differ by the prefixes of wrappers only.

    Raises:
        UserError: the file has no tensors.
    """
    names = {_bare(name): name for name in network.state_dict()}
    return {names.get(bare, bare): entry.tensor for bare, entry in released_tensors(content).items()}


def check_finite(network: MultiExitNetwork, source: str) -> None:
    """Check the values of a network that `source` has given; buffers may be infinite, as masks are.

    Raises:
        UserError: a parameter is not finite, or a buffer is NaN.
    """
    parameters = [name for name, value in network.named_parameters() if not value.isfinite().all()]
    wrong = parameters + [name for name, value in network.named_buffers() if value.isnan().any()]
    if wrong:
        more = f" and {counted(len(wrong) - 1, 'more tensor')}" if len(wrong) > 1 else ""
        raise UserError(f"the weights of {source} are not finite ({wrong[0]}{more}); expected finite numbers")


def _bare(name: str) -> str:
    """Return a name without what `DataParallel` and `torch.compile` put before names of parts."""
    return re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", name)


def released_tensors(content: Any) -> dict[str, _FileTensor]:
    """Return the tensors of a file by their names without the prefixes of wrappers; nested dictionaries are searched.

    Raises:
        UserError: the file has no tensors.
    """
    wrapped = content
    for _ in range(len(WRAPPERS)):
        inner = [content[key] for key in WRAPPERS if isinstance(content, Mapping) and key in content]
        content = next((value for value in inner if isinstance(value, Mapping)), content)
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        _bare(name): _FileTensor(name, tensor)
        for name, tensor in items
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        keys = f" with {', '.join(map(str, list(wrapped)[:5]))}" if isinstance(wrapped, Mapping) else ""
        raise UserError(
            f"a {type(wrapped).__name__}{keys} has no named tensors; expected a state dict, alone or under the key "
            f"{' or '.join(WRAPPERS[:2])}"
        )
    return tensors


def _names_in_file(
    network: MultiExitNetwork, strategy: NamesReleased | None, tensors: Mapping[str, _FileTensor]
) -> dict[str, str]:
    """Return {name of a tensor: its name in the file}, which has exitkit's names or those of the authors."""
    own = {name: _bare(name) for name in network.state_dict()}
    released = _released_names(network, strategy) if network.family in LAYOUTS else {}
    if sum(name in tensors for name in own.values()) > sum(name in tensors for name in released.values()):
        return own
    return released or _released_names(network, strategy)


def _released_names(network: MultiExitNetwork, strategy: NamesReleased | None) -> dict[str, str]:
    if network.family not in LAYOUTS:
        raise UserError(
            f"no released weights are known for the family {network.family!r}; expected one of "
            f"{', '.join(sorted(LAYOUTS))}"
        )
    names = LAYOUTS[network.family].names(network)
    rules = tuple(strategy.released_names().items()) if strategy else ()
    return {name: replace_prefix(file_name, rules) for name, file_name in names.items()}


def _shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a scalar tensor in the shape of `like` ([] or [1]), and any other tensor unchanged."""
    scalars = tensor.numel() == like.numel() == 1 and max(tensor.ndim, like.ndim) <= 1
    return tensor.reshape(like.shape) if scalars else tensor


def _describe_misfit(name: str, value: Tensor, file_name: str, tensors: Mapping[str, _FileTensor]) -> str:
    expected = f"{name} {list(value.shape)}"
    if file_name in tensors:
        entry = tensors[file_name]
        return f"{expected} is {entry.name} in the file, of shape {list(entry.tensor.shape)}"
    near = get_close_matches(file_name, tensors, n=1)
    nearest = f" (nearest: {tensors[near[0]].name} {list(tensors[near[0]].tensor.shape)})" if near else ""
    return f"{expected} would be {file_name} in the file, which is missing{nearest}"


def read_released_file(path: Path) -> Mapping[str, Any]:
    """Read a file of weights, a pickle (`.pth`, `.pt`, `.pth.tar`) or safetensors; no code in it is executed.

    Raises:
        UserError: the file is missing, is damaged, or contains objects other than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; expected a file of released weights")
    if _is_safetensors(path):
        return load_tensors(path)
    try:
        # torch warns about a pickle before it refuses it; of a path, it would also read the ending.
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)", str(error))
        if refused is None:
            raise _damaged(path, error) from None
        tensors = ".state_dict()" if _is_object(path) else "['state_dict']"
        raise UserError(
            f"{path} contains objects other than tensors ({refused[1]}), which are not loaded; if you trust the file, "
            "save its tensors only: "
            f"torch.save(torch.load({path.name!r}, weights_only=False){tensors}, 'weights.pth')"
        ) from None
    except Exception as error:  # torch raises errors of many types for a damaged file
        raise _damaged(path, error) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} contains a {type(content).__name__}; expected a state dict, or a checkpoint with one")
    return content


def _is_safetensors(path: Path) -> bool:
    """Whether a file has the form of safetensors, or its ending and no other known form."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not start.startswith(b"PK"))


def _is_object(path: Path) -> bool:
    """Whether a file of `torch.save` holds one object, such as a network, and not a dictionary; nothing is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            names = (f"{code.name} {argument}" for code, argument, _ in pickletools.genops(archive.read(pickled)))
            first = next(name for name in names if not name.startswith(("PROTO", "FRAME")))
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return False
    return first.startswith("GLOBAL") and "OrderedDict" not in first


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return UserError(f"{path} is damaged or not a file of weights ({type(error).__name__}: {reason[:120]})")
