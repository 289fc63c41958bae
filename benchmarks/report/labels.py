"""What runs are called in a table: by their method, network and data, and by the fields in which they differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from exitkit.benchmarks.published.defaults import default_fields

Identity = Mapping[str, str]
"""What makes a run this run, flat, as `RunFolder.identity` gives it."""


_SCHEDULE = ("epochs", "batch_size", "lr", "schedule")


class Names(NamedTuple):
    """What one run is called: `imta second=isc`, `msdnet-tiny`, `digits`."""

    method: str
    backbone: str
    dataset: str


def name_runs(identities: Sequence[Identity]) -> list[Names]:
    """Name runs so that those that differ in more than the seed have different names.

    Networks and data sets are told apart by their fields wherever they occur; methods on one network and data set by
    their own fields and by those of the recipe (`epochs`, `batch_size`, ...). Where several fields differ, those are
    named that are not at their default.
    """
    backbones = _told_apart(identities, "backbone", lambda key: key.startswith("backbone."))
    datasets = _told_apart(identities, "dataset", lambda key: key.startswith("dataset."))
    names = [Names("", *pair) for pair in zip(backbones, datasets, strict=True)]
    for group in dict.fromkeys(names):
        members = [place for place, name in enumerate(names) if name[1:] == group[1:]]
        labels = _told_apart([identities[place] for place in members], "method", _of_method)
        for place, label in zip(members, labels, strict=True):
            names[place] = names[place]._replace(method=label)
    return names


def unlike(identities: Sequence[Identity], labels: Sequence[str]) -> list[str]:
    """Say in which fields of the recipe runs of *different* methods differ: nothing, where they can be compared."""
    notes = []
    keys = dict.fromkeys(key for one in identities for key in one if "." not in key)
    for key in keys:
        if key in ("seed", "method", "backbone", "dataset"):
            continue
        has: dict[str, dict[str, None]] = {}
        for one, label in zip(identities, labels, strict=True):
            has.setdefault(label, {}).setdefault(_text(one.get(key, "null")))
        if len({tuple(values) for values in has.values()}) > 1:
            told = (f"{label} {'/'.join(value or 'none' for value in values)}" for label, values in has.items())
            notes.append(f"{key} differs: " + ", ".join(told))
    return notes


def in_common(identities: Sequence[Identity]) -> str:
    """Say what runs of one network and data set have in common, as far as it is known and not at its default.

    Such as "msdnet with blocks=5, growth=4; digits with per_class=40; epochs=8, batch_size=64, lr=0.1".
    """
    first = identities[0]
    same = {key: value for key, value in first.items() if all(one.get(key) == value for one in identities)}
    usual = default_fields(first)
    told = []
    for kind in ("backbone", "dataset"):
        keys = [key for key in same if key.startswith(f"{kind}.") and same[key] != usual.get(key)]
        fields = [f"{_short(key)}={_text(same[key])}" for key in keys]
        told.append(" with ".join([json.loads(first[kind]), *([", ".join(fields)] if fields else [])]))
    schedule = [key for key in _SCHEDULE if key in same]
    variant = [key for key in same if key.endswith(".variant")]
    told.append(", ".join(f"{_short(key)}={_text(same[key])}" for key in [*schedule, *variant]))
    return "; ".join(part for part in told if part)


def _of_method(key: str) -> bool:
    return not key.startswith(("backbone", "dataset")) and key not in ("seed", "method")


def _told_apart(identities: Sequence[Identity], kind: str, counts: object) -> list[str]:
    assert callable(counts)
    labels = []
    varying: dict[str, list[str]] = {}
    for one in identities:
        name = str(json.loads(one[kind]))
        if name not in varying:
            alike = [other for other in identities if other[kind] == one[kind]]
            varying[name] = _varying(alike, [key for key in dict.fromkeys(k for o in alike for k in o) if counts(key)])
        keys = varying[name]
        if len(keys) > 1:
            usual = default_fields(one)
            keys = [key for key in keys if one.get(key, "null") != usual.get(key)]
        labels.append(" ".join([name, *(f"{_short(key)}={_text(one.get(key, 'null'))}" for key in keys)]))
    return labels


def _varying(alike: Sequence[Identity], keys: Iterable[str]) -> list[str]:
    """Return the keys in which these differ, but for those that the field `variant` already says."""
    found = [key for key in keys if len({one.get(key) for one in alike}) > 1]
    variant = next((key for key in found if key.endswith(".variant")), None)
    if variant is None:
        return found
    said = {key for key in found if len({(one.get(variant), one.get(key)) for one in alike}) == _count(alike, variant)}
    return [variant, *(key for key in found if key not in said)]


def _count(alike: Sequence[Identity], key: str) -> int:
    return len({one.get(key) for one in alike})


def _short(key: str) -> str:
    return key.partition(".")[2] or key


def _text(value: str) -> str:
    """Write a JSON value as the command line takes it."""
    read = json.loads(value)
    if isinstance(read, list):
        return ",".join(map(str, read))
    return str(read).lower() if read is None or isinstance(read, bool) else str(read)
