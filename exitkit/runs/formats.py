"""Formats of the small files of a run folder, and their validation.

A file may be truncated, edited, or copied from another run; every reader validates it and reports a fault in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import Field

# Before Python 3.12 pydantic takes no other.
from typing_extensions import TypedDict

from exitkit.errors import DamagedError
from exitkit.escaping import counted
from exitkit.files import checked, read_json

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


CHECKPOINT_KEYS = {"network", "optimizer", "scaler", "strategy", "auxiliaries", "position", "metrics", "probes"}
"""Keys of every checkpoint."""


Size = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class ExitCost(TypedDict):
    """Cost of leaving at an exit."""

    exit: Count
    papers: Count
    macs: Count
    params: Count


class Results(TypedDict):
    """Accuracy of each exit, in percent."""

    validation: Annotated[list[Percent], Field(min_length=1)]
    test: Annotated[list[Percent], Field(min_length=1)]
    images: NotRequired[str]
    left_out: NotRequired[dict[str, list[str]]]


class Environment(TypedDict):
    """Versions, device and data with which a run began."""

    exitkit: str
    torch: str
    device: str
    gpu: str | None
    processor: NotRequired[str]
    ranks: NotRequired[Size]
    python: NotRequired[str]
    system: NotRequired[str]
    started: NotRequired[str]
    code: NotRequired[str]
    images: NotRequired[str | None]
    input_shape: NotRequired[Annotated[list[Size], Field(min_length=3, max_length=3)]]
    num_classes: NotRequired[Size]
    preprocessing: NotRequired[dict[str, Any] | None]
    class_names: NotRequired[list[str]]


class Learned(TypedDict):
    """A table that a method learned besides the network."""

    phase: str
    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[Number | None]]


class Latency(TypedDict):
    """Milliseconds until the prediction of each exit."""

    milliseconds: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


def read_checked(path: Path, kind: Any) -> Any:
    """Return the content of a JSON file, which must have the type `kind`.

    Raises:
        DamagedError: the file is missing, damaged or of another type.
    """
    return checked(path, kind, read_json(path))


def read_costs(path: Path) -> list[dict[str, int]]:
    """Return the content of `cost.json`: one row per exit; exits are numbered from 1."""
    costs: list[dict[str, int]] = read_checked(path, list[ExitCost])
    if [row["exit"] for row in costs] != list(range(1, len(costs) + 1)) or not costs:
        raise DamagedError(f"{path} is damaged (expected exits 1, 2, ... in order)")
    return costs


def read_learned(path: Path) -> list[dict[str, Any]]:
    """Return the content of `learned.json`: tables with one value per row and column."""
    tables: list[dict[str, Any]] = read_checked(path, list[Learned])
    for table in tables:
        if [len(row) for row in table["values"]] != [len(table["columns"])] * len(table["rows"]):
            raise DamagedError(f"{path} is damaged (the values of {table['title']!r} do not fit its rows and columns)")
    return tables


def read_table(path: Path, words: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """Return the table of a CSV file, which must have the columns `words` and the numeric columns `numbers`.

    Raises:
        DamagedError: the file is missing or damaged, or a column is missing or not numeric.
    """
    # Imported when used: pandas takes half a second to load.
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise DamagedError(f"{path} can't be read ({reason})") from None
    missing = [name for name in (*words, *numbers) if name not in table]
    if missing:
        raise DamagedError(f"{path} is damaged (it lacks the column {missing[0]})")
    for name in numbers:
        if not pd.api.types.is_numeric_dtype(table[name]) and len(table):
            raise DamagedError(f"{path} is damaged (the column {name} has a value that is not a number)")
    return table


def left_out(part: str, messages: Sequence[str]) -> str:
    """Return the text about the images that an evaluation goes on without."""
    more = f"; and {len(messages) - 3} more" if len(messages) > 3 else ""
    return f"without {counted(len(messages), f'{part} image')}: {'; '.join(messages[:3])}{more}"


def check_outputs(path: Path, arrays: Mapping[str, np.ndarray], accuracies: Sequence[float]) -> None:
    """Check the stored outputs of all exits, and compare their accuracy with the stored accuracies (percent).

    Raises:
        DamagedError: an array is missing or of the wrong shape or type, or the outputs are of another run.
    """
    missing = {"logits", "labels", "indices"} - arrays.keys()
    if missing:
        raise DamagedError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    logits, labels, indices = (arrays[name] for name in ("logits", "labels", "indices"))
    valid = logits.ndim == 3 and logits.dtype.kind == "f" and 0 not in logits.shape
    valid = valid and all(array.shape == logits.shape[:1] and array.dtype.kind == "i" for array in (labels, indices))
    if not valid or labels.min() < 0 or labels.max() >= logits.shape[2] or indices.min() < 0:
        raise DamagedError(
            f"{path} is damaged: expected logits [N, K, C], and labels [N] and indices [N] that fit them"
        )
    computed = 100 * (logits.argmax(axis=2) == labels[:, None]).mean(axis=0)
    if len(computed) != len(accuracies) or any(
        not math.isclose(value, stored, abs_tol=1e-6) for value, stored in zip(computed, accuracies, strict=True)
    ):
        raise DamagedError(
            f"{path} and {path.with_name('results.json')} are of different evaluations; evaluate the run again"
        )


_PROBED = {"cosine": "TSKK", "norm": "TSK", "total_norm": "TS", "total_variance": "TS", "valid": "TK", "loss": "TK"}
_PROBED |= {"losses": "TNK", "epoch": "T"}


def check_probes(path: Path, arrays: Mapping[str, np.ndarray], epochs: int) -> None:
    """Check the arrays of T probes, for S stages, K exits and N images; none may be later than epoch `epochs`.

    Raises:
        DamagedError: an array is missing, or has the wrong shape or type.
    """
    missing = _PROBED.keys() - arrays.keys()
    if missing:
        raise DamagedError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    sizes: dict[str, int] = {}
    for name, letters in _PROBED.items():
        array = arrays[name]
        valid = array.dtype.kind == ("i" if name == "epoch" else "f") and array.ndim == len(letters)
        pairs = zip(letters, array.shape, strict=True) if valid else ()
        if not valid or any(sizes.setdefault(letter, size) != size or not size for letter, size in pairs):
            raise DamagedError(f"{path} is damaged: {name} has the wrong shape or type")
    if arrays["epoch"].min() < 1 or arrays["epoch"].max() > epochs:
        raise DamagedError(f"{path} is damaged: it has probes of epochs that were not trained")
