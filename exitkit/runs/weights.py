"""Files of other runs that a run uses: trained weights, side networks, and their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from exitkit.errors import UserError
from exitkit.files import load_checkpoint
from exitkit.runs.folder import WEIGHTS, RunFolder
from exitkit.runs.formats import CHECKPOINT_KEYS


def weights_file(source: str) -> Path:
    """Return the file of the weights of `init_from`, which is the folder of a finished run, or a file of weights.

    Raises:
        UserError: `source` is neither.
    """
    path = Path(source)
    if path.is_dir():
        return run_weights(source)
    if not path.is_file():
        raise UserError(f"init_from is {source}; expected the folder of a finished run, or a file of weights")
    return path


def run_weights(folder: str | Path) -> Path:
    """Return the file of a finished run's weights.

    Raises:
        UserError: the run does not exist, or is not finished.
    """
    run = RunFolder(folder)
    run.results()  # the error for an unfinished run explains how to resume it
    return run.own(WEIGHTS)


def weights_digest(source: str) -> str:
    """Return a digest of the weights of `init_from`."""
    return _file_digest(weights_file(source))


def run_weights_digest(folder: str) -> str:
    """Return a digest of a finished run's weights."""
    return _file_digest(run_weights(folder))


def side_networks_digest(source: str) -> str:
    """Return a digest of a finished run's checkpoint, which contains its side networks."""
    run = RunFolder(source)
    run.results()  # the error for an unfinished run explains how to resume it
    return _file_digest(run.path / "checkpoint.pt")


def published_weights_digest(source: str) -> str:
    """Return a digest of a file of another library's weights, or of all such files of a folder.

    Raises:
        UserError: the file or folder does not exist, or the folder holds no weights.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"the weights {source} do not exist; expected a file, or a folder of a saved network")
        return _file_digest(path)
    files = sorted(file for ending in _ENDINGS for file in path.glob(f"*{ending}"))
    if not files:
        raise UserError(f"{source} holds no weights ({', '.join(_ENDINGS)})")
    return hashlib.sha256("".join(map(_file_digest, files)).encode()).hexdigest()[:16]


_ENDINGS = (".safetensors", ".bin")


def check_unchanged(source: str, digest: str, planned: str | None) -> None:
    """Check that weights are those that a run was planned with; `planned` is None for runs without a digest.

    Raises:
        UserError: they have changed.
    """
    if planned is not None and digest != planned:
        raise UserError(f"the weights of {source} have changed since this run was planned; make a new run")


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def side_network(source: str, name: str) -> Mapping[str, Tensor]:
    """Return the tensors of a side network, as they were at the end of a finished run.

    Raises:
        UserError: the run is not finished, or has no such network.
    """
    run = RunFolder(source)
    run.results()
    saved = load_checkpoint(run.path / "checkpoint.pt", CHECKPOINT_KEYS)["auxiliaries"]
    if name not in saved:
        raise UserError(f"run {source} has no {name} network; it has {', '.join(saved) or 'none'}")
    module: Mapping[str, Tensor] = saved[name]["module"]
    return module
