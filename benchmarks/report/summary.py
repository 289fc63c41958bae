"""Summaries of finished runs: the measures of the report and the small files, without weights and outputs.

A summary of a comparison is a few KB per run. `exitkit report` makes the same tables from it as from the runs, and
`exitkit compare` counts its runs as finished.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.comparison import Comparison
from exitkit.benchmarks.report.measure import FinishedRun, Measured, RunMeasures
from exitkit.benchmarks.report.options import ReportOptions
from exitkit.errors import UserError
from exitkit.files import drafted, exists, make_folder, read_json, write_json

MEASURES = "measures.json"
RECIPE = "recipe.json"
FILES = (
    *(RECIPE, "environment.json", "metrics.csv", "timing.csv", "learned.json"),
    *("cost.json", "latency.json", "classes.csv", "results.json"),
)
"""The files of a run folder that its summary contains."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def measured(run: FinishedRun, options: ReportOptions, budgets: np.ndarray) -> Measured:
    """Return the measures of a run, from its outputs, or stored ones if the run is a summary.

    Args:
        run: the run.
        options: options of the report.
        budgets: average budgets of the budgeted table.

    Raises:
        UserError: the run has no validation samples, or is a summary that was made with other options.
    """
    if exists(Path(run.path) / MEASURES):
        return _read(Path(run.path) / MEASURES, _options(options, budgets))
    measures = RunMeasures(run, options)
    samples = hashlib.sha256(np.sort(measures.test["indices"]).astype("<i8").tobytes()).hexdigest()
    return Measured(samples, measures.tables(budgets) | _probes(run))


def write_summary(comparison: Comparison, runs: Iterable[FinishedRun], out: Path) -> None:
    """Write the summary of a comparison to the folder `out`, one folder per run; existing folders are replaced.

    Args:
        comparison: the comparison; the summary holds the measures for its options and budgets only.
        runs: its runs.
        out: the folder.

    Raises:
        UserError: a file can't be written, or a folder that would be replaced is no summary.
    """
    make_folder(out)
    places = {Path(run.path): out / Path(run.path).name for run in runs}
    for path in places.values():
        if exists(path) and not exists(path / MEASURES):
            raise UserError(f"{path} is no summary, and would be replaced; expected another folder for the summary")
    for source, path in places.items():
        if source.resolve() == path.resolve():
            continue
        names = comparison.names[source.name]
        budgets = comparison.budgets[names.backbone, names.dataset]
        measures = comparison.measured[source.name]
        tables = {name: _encoded(table) for name, table in measures.tables.items()}
        content = {"options": _options(comparison.options, budgets), "samples": measures.samples, "tables": tables}
        with drafted(path) as draft:
            for name in FILES:
                if exists(source / name):
                    shutil.copyfile(source / name, draft / name)
            if exists(draft / RECIPE):
                write_json(draft / RECIPE, read_json(draft / RECIPE) | {"data_dir": None})  # a folder of this machine
            write_json(draft / MEASURES, content)
            if exists(path):
                shutil.rmtree(path)
            draft.rename(path)


def _probes(run: FinishedRun) -> dict[str, pd.DataFrame]:
    """Return {"probes": one row per probe}, or {} for a run without probes; see `claims.measure_of` for the columns."""
    probes = run.probes()
    if not probes:
        return {}
    cosine = probes["cosine"][:, :-1]  # of the trunk: the last stage is read by one exit
    pairs = np.triu(np.ones(cosine.shape[-2:], dtype=bool), 1) & ~np.isnan(cosine)
    variance = probes["total_variance"][:, :-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # of a frozen trunk both are unknown
        rows = {
            "epoch": probes["epoch"],
            "conflict": 100 * ((cosine < 0) & pairs).sum((1, 2, 3)) / pairs.sum((1, 2, 3)),
            "variance": np.log(np.where(variance > 0, variance, np.nan)).mean(1),
        }
    rows |= {f"valid_{k}": 100 * share for k, share in enumerate(probes["valid"].T, 1)}
    if "weights" in probes:
        losses, weights = probes["losses"][:, :, -1], probes["weights"]
        easier = (losses <= np.median(losses, axis=1, keepdims=True))[:, :, None]
        means = [np.where(half, weights, 0).sum(1) / half.sum(1) for half in (easier, ~easier)]
        rows |= {f"easy_{k}": values for k, values in enumerate((means[0] - means[1]).T, 1)}
    return {"probes": pd.DataFrame({name: np.asarray(values, dtype=np.float64) for name, values in rows.items()})}


def _options(options: ReportOptions, budgets: np.ndarray) -> dict[str, Any]:
    """Return the options that the measures depend on."""
    names = ("cost", "points", "rule", "calibrated", "hold", "risk", "certainty", "classes")
    policies = {"policy": list(options.policy)} if options.policy else {}
    policies |= {"targets": list(options.targets)} if options.targets else {}
    return {name: getattr(options, name) for name in names} | {"budgets": [float(b) for b in budgets]} | policies


def _read(path: Path, expected: dict[str, Any]) -> Measured:
    content = read_json(path)
    try:
        # Earlier releases measured neither policies nor classes.
        options = {"policy": [], "targets": [], "classes": False} | content["options"]
        tables = {name: pd.DataFrame(_decoded(columns)) for name, columns in content["tables"].items()}
        stored = Measured(content["samples"], tables)
        needless = {"classes"} if not expected["classes"] else set()
        different = [name for name, value in expected.items() if options[name] != value and name not in needless]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); make the summary again") from None
    if different:
        name = different[0]
        raise UserError(
            f"{path.parent} is a summary made with {name} {_text(options[name])}, and its outputs are not stored; "
            f"expected the same {name}, not {_text(expected[name])}"
        )
    return stored


def _text(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(item if isinstance(item, str) else f"{item:.6g}" for item in value) or "none"


def _encoded(table: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the columns as JSON values; JSON has no infinities and no NaN, so they are words."""
    return {
        str(name): [str(v) if isinstance(v, float) and not math.isfinite(v) else v for v in column.tolist()]
        for name, column in table.items()
    }


def _decoded(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        name: [_NOT_FINITE.get(v, v) if isinstance(v, str) else v for v in column] for name, column in columns.items()
    }
