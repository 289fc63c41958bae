"""Labels of runs in tables: method, network and data set, and the fields in which they differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from exitkit.benchmarks.published.defaults import default_fields

Identity = Mapping[str, str]
"""The identity of a run: {field: JSON value}, as in `RunFolder.identity`."""


_SCHEDULE = ("epochs", "batch_size", "lr", "schedule")
_MANY = 5  # methods of one value that a note does not name one by one


class Names(NamedTuple):
    """The labels of a run, such as `imta second=isc`, `msdnet-tiny`, `digits`."""

    method: str
    backbone: str
    dataset: str


def name_runs(identities: Sequence[Identity]) -> list[Names]:
    """Return labels such that runs which differ in more than the seed have different labels.

    The labels of networks and data sets contain the fields in which they differ over all runs. The labels of methods
    contain the fields of the method and of the recipe (`epochs`, `batch_size`, ...) in which they differ on one network
    and data set. If several fields differ, only those without their default value are contained.
    """
    backbones = _labels(identities, "backbone", lambda key: key.startswith("backbone."))
    datasets = _labels(identities, "dataset", lambda key: key.startswith("dataset."))
    names = [Names("", *pair) for pair in zip(backbones, datasets, strict=True)]
    for group in dict.fromkeys(names):
        members = [index for index, name in enumerate(names) if name[1:] == group[1:]]
        labels = _labels([identities[index] for index in members], "method", _of_method)
        for index, label in zip(members, labels, strict=True):
            names[index] = names[index]._replace(method=label)
    return names


def unlike(identities: Sequence[Identity], labels: Sequence[str]) -> list[str]:
    """Return the fields of the recipe in which different methods differ, as text; empty if they are comparable."""
    notes = []
    keys = dict.fromkeys(key for identity in identities for key in identity if "." not in key)
    for key in keys:
        if key in ("seed", "method", "backbone", "dataset"):
            continue
        used: dict[str, dict[str, None]] = {}
        for identity, label in zip(identities, labels, strict=True):
            used.setdefault(label, {}).setdefault(as_text(identity.get(key, "null")))
        texts = {label: "/".join(value or "none" for value in values) for label, values in used.items()}
        if len(set(texts.values())) > 1:
            usual, count = Counter(texts.values()).most_common(1)[0]
            named = [f"{label} {text}" for label, text in texts.items() if count < _MANY or text != usual]
            notes.append(f"{key} differs: " + ", ".join([*named, *([f"all others {usual}"] if count >= _MANY else [])]))
    return notes


def in_common(identities: Sequence[Identity]) -> str:
    """Return the settings that runs on one network and data set share, without default values, as text.

    Example: "msdnet with blocks=5, growth=4; digits with per_class=40; epochs=8, batch_size=64, lr=0.1".
    """
    first = identities[0]
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in identities)}
    defaults = default_fields(first)
    texts = []
    for kind in ("backbone", "dataset"):
        keys = [key for key in shared if key.startswith(f"{kind}.") and shared[key] != defaults.get(key)]
        fields = [f"{_short(key)}={as_text(shared[key])}" for key in keys]
        texts.append(" with ".join([json.loads(first[kind]), *([", ".join(fields)] if fields else [])]))
    schedule = [key for key in _SCHEDULE if key in shared]
    variant = [key for key in shared if key.endswith(".variant")]
    texts.append(", ".join(f"{_short(key)}={as_text(shared[key])}" for key in [*schedule, *variant]))
    return "; ".join(text for text in texts if text)


def _of_method(key: str) -> bool:
    return not key.startswith(("backbone", "dataset")) and key not in ("seed", "method")


def _labels(identities: Sequence[Identity], kind: str, is_used: object) -> list[str]:
    assert callable(is_used)
    labels = []
    varying: dict[str, list[str]] = {}
    for identity in identities:
        name = str(json.loads(identity[kind]))
        if name not in varying:
            group = [other for other in identities if other[kind] == identity[kind]]
            varying[name] = _varying(group, [key for key in dict.fromkeys(k for i in group for k in i) if is_used(key)])
        keys = varying[name]
        if len(keys) > 1:
            defaults = default_fields(identity)
            keys = [key for key in keys if identity.get(key, "null") != defaults.get(key)]
        labels.append(" ".join([name, *(f"{_short(key)}={as_text(identity.get(key, 'null'))}" for key in keys)]))
    return labels


def _varying(group: Sequence[Identity], keys: Iterable[str]) -> list[str]:
    """Return the keys in which these identities differ, without those that the field `variant` determines."""
    varying = [key for key in keys if len({one.get(key) for one in group}) > 1]
    variant = next((key for key in varying if key.endswith(".variant")), None)
    if variant is None:
        return varying
    implied = {key for key in varying if len({(i.get(variant), i.get(key)) for i in group}) == _count(group, variant)}
    return [variant, *(key for key in varying if key not in implied)]


def _count(group: Sequence[Identity], key: str) -> int:
    return len({identity.get(key) for identity in group})


def _short(key: str) -> str:
    return key.partition(".")[2] or key


def as_text(value: str) -> str:
    """Return a JSON value in the format of the command line."""
    read = json.loads(value)
    if isinstance(read, list):
        return ",".join(map(str, read))
    return str(read).lower() if read is None or isinstance(read, bool) else str(read)
