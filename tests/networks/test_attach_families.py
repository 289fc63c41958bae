"""The networks of docs/backbones/families.md: a few in every run, all of them with `pytest -m full`."""

import json
import sys

import pytest

from exitkit import plugins

from doc_pages import DOCS

sys.path.insert(0, str(DOCS / "_sphinx"))

from families import LIBRARIES, RESULTS, check

STORED = json.loads(RESULTS.read_text(encoding="utf-8"))
FEW = {"vit", "test_byobnet"}
CASES = [
    pytest.param(library, name, marks=[pytest.mark.full] * (name not in FEW))
    for library, rows in STORED.items()
    for name in rows
]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("library", "name"), CASES)
def test_a_network_of_the_table_is_as_the_table_says(library, name):
    row, stored = check(library, name), STORED[library][name]
    assert row.get("results") == stored.get("results")
    assert row.get("shares") == stored.get("shares") and row["side"] == stored["side"]


def test_the_table_has_networks_of_the_list_and_most_attach():
    for library, (names, _) in LIBRARIES.items():
        rows = STORED[library]
        assert set(rows) <= set(names)
        attached = [name for name, row in rows.items() if "results" in row and not any(row["results"].values())]
        assert len(attached) >= 0.9 * len(rows), set(rows) - set(attached)
    assert set(STORED) == set(LIBRARIES) < set(plugins.registered("backbone"))
