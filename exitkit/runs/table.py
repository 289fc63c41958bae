"""Finished runs as one table."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from exitkit.errors import DamagedError, Note, UserError
from exitkit.files import given_path
from exitkit.runs.folder import RESULTS, RunFolder, absence

if TYPE_CHECKING:
    import pandas as pd


def find_runs(folder: str | Path) -> list[RunFolder]:
    """Return the finished runs in a folder, sorted by name.

    Raises:
        UserError: the folder does not exist, or contains no finished run.
    """
    folder = given_path("folder", folder)
    if not folder.is_dir():
        raise UserError(f"folder {folder} {absence(folder)}; expected one that holds runs")
    paths = sorted(path.parent for path in folder.glob(f"[!.]*/{RESULTS}"))
    if not paths:
        raise UserError(f"folder {folder} holds no finished run")
    return [RunFolder(path) for path in paths]


def load_runs(folder: str | Path) -> pd.DataFrame:
    """Read all finished runs in a folder into one table, with one row per run and exit.

    Columns: run, method, backbone, dataset, seed, epochs, exit (from 1), papers, macs, pruned, params (see
    `exitkit.networks.ExitCost`), accuracy, validation_accuracy (percent), path.

    A run with a damaged file is left out, with a `Note` that names the file.

    Raises:
        UserError: the folder does not exist, or contains no finished run; or all runs are damaged.
    """
    return table_of(intact(find_runs(folder)))


def intact(runs: Iterable[RunFolder], *, records: bool = False) -> list[RunFolder]:
    """Return the runs whose recipe, costs and results are readable; the others are left out, each with a `Note`.

    Args:
        runs: finished runs.
        records: also read the records of their epochs.

    Raises:
        UserError: every run is damaged; the message is that of the first.
    """
    good: list[RunFolder] = []
    faults: list[DamagedError] = []
    for run in runs:
        try:
            _ = run.recipe, run.results(), run.training_cost() if records else None
            good.append(run)
        except DamagedError as error:
            faults.append(error)
    if faults and not good:
        raise faults[0]
    for fault in faults:
        warnings.warn(Note(f"a run is left out: {fault}"), stacklevel=2)
    return good


def table_of(runs: Iterable[RunFolder]) -> pd.DataFrame:
    """Return the table of `load_runs` for given runs."""
    # Imported when used: pandas takes half a second to load.
    import pandas as pd

    rows = []
    for run in runs:
        recipe, results = run.recipe, run.results()
        for cost, test, validation in zip(run.costs(), results["test"], results["validation"], strict=True):
            rows.append(
                {
                    "run": run.path.name,
                    "method": recipe.method,
                    **{key: getattr(recipe, key) for key in ("backbone", "dataset", "seed", "epochs")},
                    **cost,
                    "accuracy": test,
                    "validation_accuracy": validation,
                    "path": str(run.path),
                }
            )
    return pd.DataFrame(rows)
