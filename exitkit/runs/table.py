"""Finished runs as one table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from exitkit.errors import UserError
from exitkit.runs.folder import RESULTS, RunFolder, absence

if TYPE_CHECKING:
    import pandas as pd


def find_runs(folder: str | Path) -> list[RunFolder]:
    """Return the finished runs in a folder, sorted by name.

    Raises:
        UserError: the folder does not exist, or contains no finished run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"folder {folder} {absence(folder)}; expected one that holds runs")
    paths = sorted(path.parent for path in folder.glob(f"[!.]*/{RESULTS}"))
    if not paths:
        raise UserError(f"folder {folder} holds no finished run")
    return [RunFolder(path) for path in paths]


def load_runs(folder: str | Path) -> pd.DataFrame:
    """Read all finished runs in a folder into one table, with one row per run and exit.

    Columns: run, method, backbone, dataset, seed, epochs, exit (from 1), papers, macs, params, accuracy,
    validation_accuracy (percent), path.

    Raises:
        UserError: the folder does not exist, or contains no finished run.
    """
    return table_of(find_runs(folder))


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
