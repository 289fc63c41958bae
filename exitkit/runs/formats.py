"""What the small files of a run folder have to look like: whatever else is found there is one clear line.

A file may have been cut off, edited, or copied over from another run; nothing that reads a run trusts it unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from pydantic import FiniteFloat, TypeAdapter, ValidationError

# Before Python 3.12 pydantic takes no other.
from typing_extensions import TypedDict

from exitkit.errors import UserError
from exitkit.files import read_json

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


CHECKPOINT_KEYS = {"network", "optimizer", "scaler", "strategy", "auxiliaries", "position", "metrics", "probes"}
"""What every checkpoint holds."""


class ExitCost(TypedDict):
    """What leaving at an exit costs."""

    exit: int
    papers: int
    macs: int
    params: int


class Results(TypedDict):
    """Accuracy of each exit, in percent."""

    validation: list[FiniteFloat]
    test: list[FiniteFloat]
    images: NotRequired[str]


class Environment(TypedDict):
    """Where a run began."""

    exitkit: str
    torch: str
    device: str
    gpu: str | None
    code: NotRequired[str]
    images: NotRequired[str | None]
    input_shape: NotRequired[list[int]]
    num_classes: NotRequired[int]


class Learned(TypedDict):
    """A table of what a method learned besides the network."""

    phase: str
    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


class Latency(TypedDict):
    """Milliseconds until each exit answers."""

    milliseconds: list[FiniteFloat]


def read_checked(path: Path, kind: Any) -> Any:
    """Read a JSON file that has to be of the type `kind`.

    Raises:
        UserError: it is missing, damaged or something else.
    """
    value = read_json(path)
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path} is damaged ({reason})") from None
    return value


def read_costs(path: Path) -> list[dict[str, int]]:
    """Read `cost.json`: one row an exit, counted from 1."""
    costs: list[dict[str, int]] = read_checked(path, list[ExitCost])
    if [row["exit"] for row in costs] != list(range(1, len(costs) + 1)) or not costs:
        raise UserError(f"{path} is damaged (expected exits 1, 2, ... in order)")
    return costs


def read_learned(path: Path) -> list[dict[str, Any]]:
    """Read `learned.json`: tables whose values fill their rows and columns."""
    tables: list[dict[str, Any]] = read_checked(path, list[Learned])
    for table in tables:
        if [len(row) for row in table["values"]] != [len(table["columns"])] * len(table["rows"]):
            raise UserError(f"{path} is damaged (the values of {table['title']!r} do not fill its table)")
    return tables


def read_table(path: Path, words: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """Read a CSV file that has at least these columns.

    Raises:
        UserError: it is missing or damaged, or a column is missing or holds what it must not.
    """
    # Imported when used: pandas takes half a second to load.
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' own errors are of these
        reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise UserError(f"{path} can't be read ({reason})") from None
    missing = [name for name in (*words, *numbers) if name not in table]
    if missing:
        raise UserError(f"{path} is damaged (it lacks the column {missing[0]})")
    for name in numbers:
        if not pd.api.types.is_numeric_dtype(table[name]) and len(table):
            raise UserError(f"{path} is damaged (the column {name} has something that is no number)")
    return table


def check_outputs(path: Path, arrays: Mapping[str, np.ndarray], accuracies: Sequence[float]) -> None:
    """Check what every exit said against itself, and against the accuracies that were written with it.

    Raises:
        UserError: something is missing or of the wrong kind, or these are the outputs of another run.
    """
    missing = {"logits", "labels", "indices"} - arrays.keys()
    if missing:
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    logits, labels, indices = (arrays[name] for name in ("logits", "labels", "indices"))
    whole = logits.ndim == 3 and logits.dtype.kind == "f" and 0 not in logits.shape
    whole = whole and all(each.shape == logits.shape[:1] and each.dtype.kind == "i" for each in (labels, indices))
    if not whole or labels.min() < 0 or labels.max() >= logits.shape[2] or indices.min() < 0:
        raise UserError(f"{path} is damaged: expected logits [N, K, C], and labels [N] and indices [N] that fit them")
    found = 100 * (logits.argmax(axis=2) == labels[:, None]).mean(axis=0)
    if len(found) != len(accuracies) or any(
        not math.isclose(ours, theirs, abs_tol=1e-6) for ours, theirs in zip(found, accuracies, strict=True)
    ):
        raise UserError(
            f"{path} and {path.with_name('results.json')} are not of one evaluation; evaluate the run again"
        )


_PROBED = {"cosine": "TSKK", "norm": "TSK", "total_norm": "TS", "total_variance": "TS", "valid": "TK", "loss": "TK"}
_PROBED |= {"losses": "TNK", "epoch": "T"}


def check_probes(path: Path, arrays: Mapping[str, np.ndarray], epochs: int) -> None:
    """Check what was seen on the probe batch: T looks, S stages, K exits, N images, none after the last epoch.

    Raises:
        UserError: something is missing, or does not fit the rest.
    """
    missing = _PROBED.keys() - arrays.keys()
    if missing:
        raise UserError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    sizes: dict[str, int] = {}
    for name, letters in _PROBED.items():
        array = arrays[name]
        whole = array.dtype.kind == ("i" if name == "epoch" else "f") and array.ndim == len(letters)
        pairs = zip(letters, array.shape, strict=True) if whole else ()
        if not whole or any(sizes.setdefault(letter, size) != size or not size for letter, size in pairs):
            raise UserError(f"{path} is damaged: {name} does not fit the rest")
    if arrays["epoch"].min() < 1 or arrays["epoch"].max() > epochs:
        raise UserError(f"{path} is damaged: it has looks at epochs that there were not")
