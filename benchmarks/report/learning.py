"""Learning curves per epoch and exit, and the accuracy for swept fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.comparison import GROUP, STATIC

_COLUMN = re.compile(r"(train|validation)_(accuracy|loss)_(\d+)")


def learning_curves(runs: Iterable[Any], names: Mapping[str, Any]) -> pd.DataFrame:
    """Return method, backbone, dataset, phase, epoch, exit, and means over seeds of losses and accuracies (percent).

    Epochs are numbered from 1 over all phases.

    Args:
        runs: finished runs; `metrics()` and the folder's name are read.
        names: {name of a run's folder: its labels}; runs without an entry are ignored.
    """
    keys = ["method", *GROUP]
    parts: list[tuple[tuple[str, ...], pd.DataFrame]] = []
    for run in runs:
        labels = names.get(run.path.name)
        if labels is not None and labels.method != STATIC:
            parts.append((tuple(labels), run.metrics()))
    if not parts:
        return pd.DataFrame(columns=[*keys, "phase", "epoch", "exit"])
    metrics = pd.concat([table for _, table in parts], ignore_index=True)
    sizes = [len(table) for _, table in parts]
    metrics["epoch"] = np.concatenate([np.arange(1, size + 1) for size in sizes])
    for name, values in zip(keys, zip(*(labels for labels, _ in parts), strict=True), strict=True):
        metrics[name] = np.repeat(np.array(values, dtype=object), sizes)
    order = {labels: number for number, labels in enumerate(dict.fromkeys(labels for labels, _ in parts))}
    metrics["order"] = np.repeat([order[labels] for labels, _ in parts], sizes)
    metrics["row"] = np.arange(len(metrics))
    rows = pd.concat(_exits(metrics, keys), ignore_index=True).sort_values(["order", "row", "exit"])
    grouped = rows.drop(columns=["order", "row"]).groupby([*keys, "phase", "epoch", "exit"], sort=False)
    means: pd.DataFrame = grouped.mean().reset_index()
    return means


def _exits(metrics: pd.DataFrame, keys: list[str]) -> list[pd.DataFrame]:
    """Return the losses and accuracies of each exit, one table per exit."""
    columns: dict[int, dict[str, str]] = {}
    for column in metrics:
        if found := _COLUMN.fullmatch(str(column)):
            columns.setdefault(int(found[3]), {})[str(column)] = f"{found[1]}_{found[2]}_mean"
    tables = []
    for number, named in sorted(columns.items()):
        table = metrics[[*keys, "phase", "epoch", "order", "row", *named]].rename(columns=named)
        # Runs with fewer exits have no values here.
        table = table.dropna(subset=list(named.values()), how="all").assign(exit=number)
        tables.append(table[[*keys, "phase", "epoch", "exit", "order", "row", *named.values()]])
    return tables


def sweeps(anytime: pd.DataFrame, runs: Iterable[Any], names: Mapping[str, Any]) -> pd.DataFrame:
    """Return method, backbone, dataset, field, value, exit, accuracy_mean, accuracy_sd, n of fields with numbers swept.

    A field is included if it has at least three values in runs that are otherwise the same.

    Args:
        anytime: the table of the comparison.
        runs: finished runs; `identity` and the folder's name are read.
        names: {name of a run's folder: its labels}; runs without an entry are ignored.
    """
    identities = {names[run.path.name]: run.identity for run in runs if run.path.name in names}
    fields = dict.fromkeys(key for identity in identities.values() for key in identity if key != "seed")
    tables = [pd.DataFrame(columns=["method", *GROUP, "field", "value", "exit", "accuracy_mean", "accuracy_sd", "n"])]
    for field in fields:
        lines: dict[str, dict[float, Any]] = {}
        for label, identity in identities.items():
            value = json.loads(identity.get(field, "null"))
            if isinstance(value, int | float) and not isinstance(value, bool):
                rest = {key: other for key, other in identity.items() if key not in ("seed", field)}
                lines.setdefault(json.dumps(rest, sort_keys=True), {})[value] = label
        for values in lines.values():
            if len(values) > 2:
                tables += [_swept(anytime, field, value, label) for value, label in sorted(values.items())]
    return pd.concat(tables[1:] or tables, ignore_index=True)[list(tables[0])]


def _swept(anytime: pd.DataFrame, field: str, value: float, label: Any) -> pd.DataFrame:
    rows = anytime[(anytime[["method", *GROUP]] == list(label)).all(axis=1)]
    plain = {kind: name.split(" ")[0] for kind, name in label._asdict().items()}
    return rows.assign(**plain, field=field.rpartition(".")[2], value=value)
