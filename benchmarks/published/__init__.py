"""The papers' own numbers, one CSV file a paper, with what is known to be misprinted put right and noted.

Columns: table; dataset; backbone (our preset) and method (ours), with the settings (`field=value`, spaces between) that
make ours theirs; printed (what the table calls it); exit, from 1; multiply_adds_m and params_m (millions, as printed);
accuracy (%); epochs and batch_size of the paper's schedule; note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import pandas as pd

from exitkit.benchmarks.published.defaults import network_fields, published_fields

PAPERS = ("boostnet", "imta", "metagf", "l2w")
_PLAIN = {"dataset.per_class": "null", "dataset.imbalance": "1.0"}


def load_published() -> pd.DataFrame:
    """Return all published numbers as one table: `paper`, and the columns above."""
    tables = []
    for paper in PAPERS:
        with (files(__name__) / f"{paper}.csv").open(encoding="utf-8") as file:
            blank = {"multiply_adds_m": [""], "params_m": [""]}  # not printed; other empty fields are empty text
            table = pd.read_csv(file, dtype={"settings": str, "note": str}, keep_default_na=False, na_values=blank)
        table.insert(0, "paper", paper)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def tables() -> dict[str, None]:
    """Return the name of every published table, such as "boostnet/table1", in order."""
    known = load_published()
    return dict.fromkeys(known["paper"] + "/" + known["table"])


def published_for(
    identity: Mapping[str, str], stands_for: Mapping[str, str] | None = None, only: Sequence[str] = ()
) -> pd.DataFrame:
    """Return the published rows that a run can be set beside.

    Its method's fields have to be those of the paper or of its code, but for what a row's settings say.

    Args:
        identity: what makes the run this run, flat, as `RunFolder.identity` gives it.
        stands_for: what a paper has in the place of the run's "backbone" and "dataset", if something else.
        only: names of tables; none: all.
    """
    known = load_published()
    stands_for = stands_for or {}
    for key in ("backbone", "dataset", "method"):
        known = known[known[key] == stands_for.get(key, json.loads(identity[key]))]
    if only:
        known = known[(known["paper"] + "/" + known["table"]).isin(list(only))]
    # What stands for a paper's data need not have as many images of a class as that.
    skipped = "dataset." if "dataset" in stands_for else None
    return known[known["settings"].map(lambda settings: _fits(settings, identity, skipped)).astype(bool)]


def unlike(identity: Mapping[str, str], theirs: Mapping[str, object], recipe: object) -> str:
    """Say in what a run is not the experiment of a published row: some of "network, data, schedule", or "".

    Args:
        identity: what makes the run this run, flat.
        theirs: a row of the published numbers.
        recipe: the run's; `epochs` and `batch_size` are read.
    """
    network, data = theirs["backbone"], theirs["dataset"]
    usual = network_fields(str(network))
    images = _PLAIN | {key: value for key, value in _settings(str(theirs["settings"])).items() if key in _PLAIN}
    found = {
        "network": json.loads(identity["backbone"]) != network
        or any(identity.get(key, value) != value for key, value in usual.items()),
        "data": json.loads(identity["dataset"]) != data
        or any(json.loads(identity.get(key, value)) != json.loads(value) for key, value in images.items()),
        "schedule": any(getattr(recipe, key) != theirs[key] for key in ("epochs", "batch_size")),
    }
    return ", ".join(name for name, other in found.items() if other)


def _settings(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


def _fits(settings: str, identity: Mapping[str, str], skipped: str | None) -> bool:
    wanted = _settings(settings)
    for key, value in wanted.items():
        name = key if "." in key else f"method.{key}"
        has = json.loads(identity.get(name, "null"))
        if value not in (str(has), json.dumps(has)) and not (skipped and name.startswith(skipped)):
            return False
    plain = {} if skipped else _PLAIN
    if not all(identity.get(key, value) == value for key, value in plain.items() if key not in wanted):
        return False
    named = {key if "." in key else f"method.{key}" for key in wanted}
    own = {key: value for key, value in identity.items() if key.startswith("method.") and key not in named}
    variants = published_fields(json.loads(identity["method"]))
    return not variants or any(own.items() <= fields.items() for fields in variants)
