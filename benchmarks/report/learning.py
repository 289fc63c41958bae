"""How training went, epoch by epoch and exit by exit, and what a swept field did."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from exitkit.benchmarks.report.collect import GROUP, STATIC

_COLUMN = re.compile(r"(train|validation)_(accuracy|loss)_(\d+)")


def learning_curves(runs: Iterable[Any], names: Mapping[str, Any]) -> pd.DataFrame:
    """Return method, backbone, dataset, phase, epoch, exit, and means over seeds of losses and accuracies (percent).

    Epochs are counted over all phases.

    Args:
        runs: finished runs (`metrics()` and the folder's name are read).
        names: {name of a run's folder: what it is called}; others are left out.
    """
    parts = []
    for run in runs:
        called = names.get(run.path.name)
        if called is None or called.method == STATIC:
            continue
        metrics = run.metrics()
        metrics["epoch"] = range(1, len(metrics) + 1)
        long = metrics.melt(["phase", "epoch"], [c for c in metrics if _COLUMN.fullmatch(c)])
        parsed = long["variable"].str.extract(_COLUMN)
        long = long.assign(what=parsed[0] + "_" + parsed[1] + "_mean", exit=parsed[2].astype(int))
        wide = long.pivot_table(index=["phase", "epoch", "exit"], columns="what", values="value", sort=False)
        parts.append(wide.reset_index().assign(**called._asdict()))
    if not parts:
        return pd.DataFrame(columns=["method", *GROUP, "phase", "epoch", "exit"])
    rows = pd.concat(parts, ignore_index=True)
    return rows.groupby(["method", *GROUP, "phase", "epoch", "exit"], sort=False).mean().reset_index()


def sweeps(anytime: pd.DataFrame) -> pd.DataFrame:
    """Return method, backbone, dataset, field, value, exit, accuracy_mean, accuracy_sd, n of fields with numbers swept.

    A method counts whose rows differ in one field alone, of three values or more (two make no curve), all numbers.
    """
    columns = ["method", *GROUP, "field", "value", "exit", "accuracy_mean", "accuracy_sd", "n"]
    found = []
    for axis in ("method", "backbone", "dataset"):
        parsed = anytime[axis].str.extract(r"^(?P<name>\S+) (?P<field>[\w.]+)=(?P<value>-?[\d.]+(?:e-?\d+)?)$")
        rows = anytime.assign(**{axis: parsed["name"]}, field=parsed["field"], value=parsed["value"].astype(float))
        rows = rows.dropna(subset=["field"])
        for _, mine in rows.groupby(["method", *GROUP, "field"], sort=False):
            if mine["value"].nunique() > 2:
                found.append(mine[columns])
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
