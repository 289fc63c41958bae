"""Learning curves per epoch and exit, and the accuracy for swept fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

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
    parts = []
    for run in runs:
        labels = names.get(run.path.name)
        if labels is None or labels.method == STATIC:
            continue
        metrics = run.metrics()
        metrics["epoch"] = range(1, len(metrics) + 1)
        long = metrics.melt(["phase", "epoch"], [c for c in metrics if _COLUMN.fullmatch(c)])
        parsed = long["variable"].str.extract(_COLUMN)
        long = long.assign(what=parsed[0] + "_" + parsed[1] + "_mean", exit=parsed[2].astype(int))
        wide = long.pivot_table(index=["phase", "epoch", "exit"], columns="what", values="value", sort=False)
        parts.append(wide.reset_index().assign(**labels._asdict()))
    if not parts:
        return pd.DataFrame(columns=["method", *GROUP, "phase", "epoch", "exit"])
    rows = pd.concat(parts, ignore_index=True)
    means: pd.DataFrame = rows.groupby(["method", *GROUP, "phase", "epoch", "exit"], sort=False).mean().reset_index()
    return means


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
