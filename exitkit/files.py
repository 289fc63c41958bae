"""Atomic writing of files and folders, and reading of files without executing their content."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.errors import DamagedError, UserError

if TYPE_CHECKING:
    import numpy as np
    from filelock import BaseFileLock
    from pydantic import TypeAdapter, ValidationError
    from torch import Tensor

SHARED_IMAGES = "EXITKIT_SHARED_IMAGES"
"""Environment variable: a folder of images that several processes share, see `exitkit.data.sharing`."""


DEPTH = 20
"""Number of levels of lists and dictionaries that a file may have; those of exitkit have at most five."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it is flushed to disk and renamed, or removed on failure.

    Raises:
        UserError: the disk is full, permission is missing, or another disk error occurred.
    """
    # Created by open(), so that the user's umask sets its permissions.
    with _made_and_locked(path, lambda temporary: temporary.open("xb").close()) as temporary:
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
        UserError: the folder can't be created.
    """
    with _made_and_locked(path, Path.mkdir) as draft:
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def beside(path: Path) -> Path:
    """Return a unique temporary path in the folder of `path`."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")


@contextlib.contextmanager
def _made_and_locked(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, made by `make` and locked.

    Before it is locked, another process may take it for one that a killed process left, and remove it; it is made again
    then.

    Raises:
        UserError: it can't be created.
    """
    while True:
        temporary = beside(path)
        try:
            make(temporary)
        except OSError as error:
            raise disk_error(path, error) from None
        with _locked(temporary, wait=True):
            if temporary.exists():
                yield temporary
                return


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a file or folder until the end of the block or of the process; yield whether the lock was acquired.

    If another process has the lock, `wait` waits for it. Without file locks (Windows, some file systems) it yields
    False.
    """
    if sys.platform == "win32":
        yield False
        return
    # Imported when used: Windows does not have this module.
    import fcntl

    descriptor, acquired = -1, False
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        acquired = True
    try:
        yield acquired
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def given_path(what: str, path: Any) -> Path:
    """Return a path that a script gives, as text or as a path.

    Args:
        what: what it is the path of, for the error message.
        path: the path.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"{what} is a {type(path).__name__}; expected the path of a folder")
    return Path(path)


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
    again = "free some space, then run the same command again (train: with --resume)"
    reason = {
        errno.ENOSPC: f"the disk is full; {again}",
        getattr(errno, "EDQUOT", -1): f"the disk quota is used up; {again}",  # Windows has no such error
        errno.EACCES: "no permission; choose another --out",
        errno.EROFS: "the file system is read-only; choose another --out",
    }.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"{path} can't be written: {reason}")


def acquire(lock: BaseFileLock) -> None:
    """Acquire a lock; `filelock.Timeout` and a missing folder are errors of their own.

    Raises:
        UserError: the file system has no locks, or an error of the disk occurred.
    """
    # Imported when used: most files need no lock.
    from filelock import Timeout

    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):
        raise
    except (OSError, NotImplementedError) as error:
        known = {errno.EACCES: "a folder that can be written", errno.EROFS: "a folder that can be written"}
        code, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, "")
        expected = known.get(code or 0, "a file system with locks")
        raise UserError(f"{lock.lock_file} can't be locked: {reason or error}; expected {expected}") from None


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and remove what killed processes left there.

    Raises:
        UserError: the folder can't be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is a file; expected a folder or a new path") from None
    except OSError as error:
        raise disk_error(path, error) from None
    remove_leftovers(path)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder, and keep those in use."""
    for leftover in folder.glob(f".?*.{'[0-9a-f]' * 8}.part"):  # only names that `beside` makes
        with _locked(leftover) as abandoned:
            if abandoned and leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif abandoned:
                leftover.unlink(missing_ok=True)


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files {name: function that writes to a path} to a folder, each atomically; the folder is made if missing.

    Raises:
        UserError: the folder or a file can't be written.
    """
    make_folder(folder)
    for name, write in writers.items():
        with written_whole(folder / name) as temporary:
            write(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DamagedError: the file is missing or damaged, has a number that is not finite, or is nested too deeply.
    """
    try:
        # It may have been edited on Windows, and begin with a byte order mark.
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_no_number)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: {path.parent} is not a complete run folder") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DamagedError(f"{path} can't be read: {reason}") from None
    if field := too_deep(value):
        raise DamagedError(f"{path} is damaged ({field} is nested more than {DEPTH} levels deep)")
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def too_deep(value: Any) -> str:
    """Return the first key or index of lists and dictionaries that are nested more than `DEPTH` levels deep, or ""."""
    waiting = [(value, "", 0)]
    while waiting:
        item, first, depth = waiting.pop()
        if depth > DEPTH:
            return first
        if isinstance(item, dict | list):
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            waiting += [(inner, first or str(key), depth + 1) for key, inner in pairs if isinstance(inner, dict | list)]
    return ""


def checked(where: Path | str, kind: Any, value: Any) -> Any:
    """Return a value from outside, which must have the type `kind` by pydantic's strict rules.

    Args:
        where: the file, for the message.
        kind: the type.
        value: the value, as JSON has it.

    Raises:
        DamagedError: it has another type; the message names the first wrong field.
    """
    # Imported when used: the help pages must not load pydantic.
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise DamagedError(f"{where} is damaged ({first_fault(error)})") from None
    return value


@functools.lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's check of a type; to make it takes much longer than to check a small file."""
    # Imported when used: the help pages must not load pydantic.
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def first_fault(error: ValidationError) -> str:
    """Return the first fault that pydantic found as "field: what is expected"."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).replace("Input should be", "expected")
    return f"{field}: {message}" if field else message


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
        raise DamagedError(f"{path} is missing: {path.parent} is not a complete run folder") from None
    except Exception as error:  # safetensors' own error type is not public
        raise DamagedError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
