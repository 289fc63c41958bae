"""Files that appear whole or not at all, and reading them back without running anything that they hold."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; at the end it is flushed to disk and renamed, or removed on failure.

    Raises:
        UserError: no space, no permission, or another failure of the disk.
    """
    # Made by open(), so that it has the permissions that the user's umask gives.
    temporary = beside(path)
    try:
        temporary.open("xb").close()
    except OSError as error:
        raise disk_error(path, error) from None
    with _claimed(temporary):
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        except OSError as error:
            raise disk_error(path, error) from None
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Hand out an empty folder beside `path`, to be filled and renamed to it; if it is not, it is gone at the end.

    Raises:
        OSError: it can't be made.
    """
    draft = beside(path)
    draft.mkdir()
    with _claimed(draft):
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def beside(path: Path) -> Path:
    """Return a name in the same folder that nobody else has, for what is to become `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Claim a file or a folder until the end of the block, or of this process; gives whether nobody else has it.

    Where that can't be told (Windows, a file system without locks), nobody gets it.
    """
    if sys.platform == "win32":
        yield False
        return
    # Imported when used: Windows has no such module.
    import fcntl

    descriptor, mine = -1, False
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = True
    try:
        yield mine
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def exists(path: Path) -> bool:
    """Whether there is something at `path`.

    Raises:
        UserError: it can't be told (a name too long, a folder without permission).
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path} can't be looked at: {error.strerror or error}") from None
    return True


def disk_error(path: Path, error: OSError) -> UserError:
    """Say in one line why `path` can't be written."""
    reason = {
        errno.ENOSPC: "the disk is full; free some space and start again, it will go on where it was",
        errno.EACCES: "no permission; choose another --out",
        errno.EROFS: "the file system is read-only; choose another --out",
    }.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"{path} can't be written: {reason}")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and clear away what processes that were killed have been writing there.

    Raises:
        UserError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is a file; expected a folder, or a name that is free") from None
    except OSError as error:
        raise disk_error(path, error) from None
    for leftover in path.glob(f".?*.{'[0-9a-f]' * 8}.part"):  # as `beside` names them, and nobody else's
        with _claimed(leftover) as dead:
            if dead and leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif dead:
                leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        UserError: it can't be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise disk_error(path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a whole run folder") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} can't be read: {reason}") from None


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole."""
    # Imported when used: most files need neither torch nor safetensors.
    import torch

    # Through memory: what torch says of a failed write does not tell that the disk is full.
    content = io.BytesIO()
    torch.save(dict(state), content)
    with written_whole(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: Path, keys: set[str]) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed (`weights_only=True`).

    Args:
        path: the file.
        keys: what it has to hold.

    Raises:
        UserError: it is damaged, or no checkpoint of exitkit.
    """
    # Imported when used: most files need neither torch nor safetensors.
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # what torch thinks of a foreign pickle, before it refuses it
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not what it should be
        kind = type(error).__name__
        raise UserError(
            f"{path} is no checkpoint that can be trusted ({kind}): it is damaged or foreign, and nothing in it was "
            "run; delete it to start this run anew"
        ) from None
    if not isinstance(state, dict) or not keys <= state.keys():
        raise UserError(f"{path} is not a checkpoint of exitkit; delete it to start this run anew")
    return state


def save_tensors(path: Path, tensors: Mapping[str, Tensor], run: str | None = None) -> None:
    """Write tensors by name, whole (safetensors), and the name of the run that they belong to, if to any."""
    # Imported when used: most files need neither torch nor safetensors.
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(plain, {"run": run} if run else None)
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def owner(path: Path) -> str | None:
    """Return the name of the run that tensors were written for; None for a file that names none, or is not there.

    Raises:
        UserError: the file is damaged.
    """
    # Imported when used: most files need neither torch nor safetensors.
    from safetensors import safe_open

    def read(path: Path) -> str | None:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("run")

    found: str | None = _safetensors(path, read) if exists(path) else None
    return found


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors by name.

    Raises:
        UserError: the file is missing or damaged.
    """
    # Imported when used: most files need neither torch nor safetensors.
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = _safetensors(path, load_file)
    return tensors


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read tensors by name as numpy arrays, without torch.

    Raises:
        UserError: the file is missing or damaged.
    """
    # Imported when used: most files need neither torch nor safetensors.
    from safetensors.numpy import load_file

    arrays: dict[str, np.ndarray] = _safetensors(path, load_file)
    return arrays


def _safetensors(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a whole run folder") from None
    except Exception as error:  # safetensors' own error type is not public
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
