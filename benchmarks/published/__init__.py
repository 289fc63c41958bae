"""The published results of the papers, one CSV file per paper; known misprints are corrected and noted.

Columns: table; dataset; backbone and method, by their exitkit names; settings, the method's `field=value` pairs of the
paper, separated by spaces; printed, the name in the paper's table; exit, from 1; multiply_adds_m and params_m, in
millions, as printed; accuracy (%); epochs and batch_size of the paper's schedule, 0 where they are not stated; note.

A backbone or method in parentheses is one that exitkit does not have, or that the source does not state. Rows of exit 0
are of all exits together: an ensemble, or early exit at the mean cost in multiply_adds_m; without an accuracy, the note
has what was published instead. Both kinds of rows are for reading, and match no run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import pandas as pd

from exitkit.benchmarks.published.defaults import network_fields, published_fields

PAPERS = ("boostnet", "imta", "metagf", "l2w", "dfs", "byot", "cgt")
_PLAIN = {"dataset.per_class": "null", "dataset.imbalance": "1.0"}


def load_published() -> pd.DataFrame:
    """Return all published results as one table: `paper`, and the columns above."""
    tables = []
    for paper in PAPERS:
        with (files(__name__) / f"{paper}.csv").open(encoding="utf-8") as file:
            # Empty: not printed in the paper; other empty fields are text.
            blank = {key: [""] for key in ("multiply_adds_m", "params_m", "accuracy")}
            table = pd.read_csv(file, dtype={"settings": str, "note": str}, keep_default_na=False, na_values=blank)
        table.insert(0, "paper", paper)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def tables() -> dict[str, None]:
    """Return the names of the published tables, such as "boostnet/table1", in order."""
    known = load_published()
    return dict.fromkeys(known["paper"] + "/" + known["table"])


def published_for(
    identity: Mapping[str, str], stands_for: Mapping[str, str] | None = None, only: Sequence[str] = ()
) -> pd.DataFrame:
    """Return the published rows for the method, network and data set of a run.

    Apart from a row's settings, the fields of the run's method must be those of the paper or of its code.

    Args:
        identity: identity of the run, {field: JSON value}, as in `RunFolder.identity`.
        stands_for: the paper's "backbone" and "dataset" that those of the run stand for, if different.
        only: names of tables; empty: all.
    """
    known = load_published()
    known = known[known["exit"] > 0]  # others are of all exits together
    stands_for = stands_for or {}
    for key in ("backbone", "dataset", "method"):
        known = known[known[key] == stands_for.get(key, json.loads(identity[key]))]
    if only:
        known = known[(known["paper"] + "/" + known["table"]).isin(list(only))]
    # A data set that stands for the paper's may have another number of images per class.
    skipped = "dataset." if "dataset" in stands_for else None
    return known[known["settings"].map(lambda settings: _fits(settings, identity, skipped)).astype(bool)]


def unlike(identity: Mapping[str, str], published: Mapping[str, object], recipe: object) -> str:
    """Return what differs between a run and a published experiment: some of "network, data, schedule", or "".

    Args:
        identity: identity of the run, {field: JSON value}.
        published: a row of the published results.
        recipe: recipe of the run; `epochs` and `batch_size` are read.
    """
    network, data = published["backbone"], published["dataset"]
    defaults = network_fields(str(network))
    images = _PLAIN | {key: value for key, value in _settings(str(published["settings"])).items() if key in _PLAIN}
    differs = {
        "network": json.loads(identity["backbone"]) != network
        or any(identity.get(key, value) != value for key, value in defaults.items()),
        "data": json.loads(identity["dataset"]) != data
        or any(json.loads(identity.get(key, value)) != json.loads(value) for key, value in images.items()),
        "schedule": any(getattr(recipe, key) != published[key] for key in ("epochs", "batch_size")),
    }
    return ", ".join(name for name, different in differs.items() if different)


def _settings(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


def _fits(settings: str, identity: Mapping[str, str], skipped: str | None) -> bool:
    expected = _settings(settings)
    for key, value in expected.items():
        name = key if "." in key else f"method.{key}"
        actual = json.loads(identity.get(name, "null"))
        if value not in (str(actual), json.dumps(actual)) and not (skipped and name.startswith(skipped)):
            return False
    plain = {} if skipped else _PLAIN
    if not all(identity.get(key, value) == value for key, value in plain.items() if key not in expected):
        return False
    named = {key if "." in key else f"method.{key}" for key in expected}
    rest = {key: value for key, value in identity.items() if key.startswith("method.") and key not in named}
    variants = published_fields(json.loads(identity["method"]))
    return not variants or any(rest.items() <= fields.items() for fields in variants)
