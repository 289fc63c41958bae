"""Atomic writing of files and folders, and reading of files without executing their content."""

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
    """Yield a temporary path beside `path`; at the end it is flushed to disk and renamed, or removed on failure.

    Raises:
        UserError: the disk is full, permission is missing, or another disk error occurred.
    """
    # Created by open(), so that the user's umask sets its permissions.
    temporary = beside(path)
    try:
        temporary.open("xb").close()
    except OSError as error:
        raise disk_error(path, error) from None
    with _locked(temporary):
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
    """Yield an empty folder beside `path`, to be filled and renamed to `path`; otherwise it is removed at the end.

    Raises:
        OSError: the folder can't be created.
    """
    draft = beside(path)
    draft.mkdir()
    with _locked(draft):
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def beside(path: Path) -> Path:
    """Return a unique temporary path in the folder of `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder until the end of the block or of the process; yield whether the lock was acquired.

    Without file locks (Windows, some file systems) it yields False.
    """
    if sys.platform == "win32":
        yield False
        return
    # Imported when used: Windows does not have this module.
    import fcntl

    descriptor, acquired = -1, False
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        acquired = True
    try:
        yield acquired
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def exists(path: Path) -> bool:
    """Return whether a file, folder or link exists at `path`.

    Raises:
        UserError: the system refuses the check (the name is too long, the folder gives no permission).
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path} can't be accessed: {error.strerror or error}") from None
    return True


def disk_error(path: Path, error: OSError) -> UserError:
    """Return the error for a failed write to `path`, with its reason in one line."""
    reason = {
        errno.ENOSPC: "the disk is full; free some space, then resume",
        errno.EACCES: "no permission; choose another --out",
        errno.EROFS: "the file system is read-only; choose another --out",
    }.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"{path} can't be written: {reason}")


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and remove the temporary files that killed processes left there.

    Raises:
        UserError: the folder can't be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is a file; expected a folder or a new path") from None
    except OSError as error:
        raise disk_error(path, error) from None
    for leftover in path.glob(f".?*.{'[0-9a-f]' * 8}.part"):  # only names that `beside` makes
        with _locked(leftover) as abandoned:
            if abandoned and leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif abandoned:
                leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file.

    Raises:
        UserError: the file can't be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise disk_error(path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a complete run folder") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} can't be read: {reason}") from None


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically."""
    # Imported when used: most files need neither torch nor safetensors.
    import torch

    # Serialised in memory first: torch's error for a failed write does not report that the disk is full.
    content = io.BytesIO()
    torch.save(dict(state), content)
    with written_whole(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: Path, keys: set[str]) -> dict[str, Any]:
    """Read a checkpoint; no code in it is executed (`weights_only=True`).

    Args:
        path: the file.
        keys: keys that the checkpoint must contain.

    Raises:
        UserError: the file is damaged, or is not a checkpoint of exitkit.
    """
    # Imported when used: most files need neither torch nor safetensors.
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of a foreign pickle before it rejects it
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of error for invalid files
        kind = type(error).__name__
        raise UserError(
            f"{path} is not a valid checkpoint ({kind}): it is damaged or not from exitkit, and no code in it was "
            "executed; delete it to start this run from the beginning"
        ) from None
    if not isinstance(state, dict) or not keys <= state.keys():
        raise UserError(f"{path} is not a checkpoint of exitkit; delete it to start this run from the beginning")
    return state


def save_tensors(path: Path, tensors: Mapping[str, Tensor], run: str | None = None) -> None:
    """Write named tensors atomically (safetensors), with the name of the run that they belong to, if given."""
    # Imported when used: most files need neither torch nor safetensors.
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(plain, {"run": run} if run else None)
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def owner(path: Path) -> str | None:
    """Return the name of the run that a tensor file belongs to; None if it names no run or does not exist.

    Raises:
        UserError: the file is damaged.
    """
    # Imported when used: most files need neither torch nor safetensors.
    from safetensors import safe_open

    def read(path: Path) -> str | None:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("run")

    run: str | None = _safetensors(path, read) if exists(path) else None
    return run


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors {name: tensor}, on the CPU.

    Raises:
        UserError: the file is missing or damaged.
    """
    # Imported when used: most files need neither torch nor safetensors.
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = _safetensors(path, load_file)
    return tensors


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read named tensors as numpy arrays {name: array}, without importing torch.

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
        raise UserError(f"{path} is missing: {path.parent} is not a complete run folder") from None
    except Exception as error:  # safetensors' own error type is not public
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
