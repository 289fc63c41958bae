"""Tables that the pages do not type: the directives ask exitkit's catalogue, and what `measure.py` counted.

{facts} ge           paper, slots, hooks, passes over the data, and what the method adds to a network
{fields} ge          every field, with type, default and meaning (several names: one table each; kind from the name)
{presets} msdnet     every preset of a family with what its first and last exit cost
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from exitkit import build_strategy
from exitkit.cli.catalogue import entries, settings_of
from exitkit.plugins import load, underlying
from exitkit.strategy.base import TrainingStrategy

HOOKS = (
    "adapt",
    "prepare",
    "exit_losses",
    "exit_weights",
    "train_step",
    "train_epoch",
    "phases",
    "teachers",
    "learned",
    "sample_weights",
)
MEASURED = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))
"""What `measure.py` counted."""
PERFORMANCE = Path(__file__).parents[1].joinpath("performance.md").read_text(encoding="utf-8")
EPOCH = r"\| {}: an epoch, in joint epochs[^|]*\|[^|]*\| ([\d.]+) \| ([\d.]+ to [\d.]+) \|"


class Table(Directive):
    """A directive that is a table: rows of MyST text."""

    optional_arguments = 1
    final_argument_whitespace = True
    headings: Sequence[str] = ()
    numeric: frozenset[int] = frozenset()

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return the table's cells for one of the directive's arguments."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Return one table for each argument."""
        names = self.arguments[0].split()
        found: list[nodes.Node] = []
        for name in names:
            if len(names) > 1:
                found += self._parsed(f"`{name}`")
            found.append(self._table(list(self.rows(name))))
        return found

    def _table(self, rows: list[Sequence[str]]) -> nodes.table:
        group = nodes.tgroup(cols=len(rows[0]))
        for _ in rows[0]:
            group += nodes.colspec(colwidth=1)
        if self.headings:
            group += nodes.thead("", self._row(self.headings))
        group += nodes.tbody("", *(self._row(row) for row in rows))
        table = nodes.table(classes=["generated"])
        table += group
        return table

    def _row(self, cells: Sequence[str]) -> nodes.row:
        row = nodes.row()
        for place, cell in enumerate(cells):
            entry = nodes.entry(classes=["number"] if place in self.numeric else [])
            row += entry
            entry += self._parsed(cell)
        return row

    def _parsed(self, text: str) -> list[nodes.Node]:
        holder = nodes.container()
        self.state.nested_parse(StringList([text], "generated"), self.content_offset, holder)
        return list(holder.children)


class Fields(Table):
    """Every field of a method, backbone or data set."""

    headings = ("field", "type", "default", "meaning")

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return a row a field."""
        for field, kind, default, meaning in settings_of(_entry(name)):
            if field != "label_smoothing" or name == "joint":
                yield f"`{field}`", kind, f"`{default}`" if default else "", meaning
        if "slots" in _entry(name) and name != "joint":
            yield "`label_smoothing`", "number", "`0.0`", "of every method"


class Facts(Table):
    """What can be told of a method by asking it."""

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return (fact, value) rows."""
        entry, method = _entry(name), underlying(load("method", name))
        ours = [hook for hook in HOOKS if any(hook in vars(each) for each in _own(method))]
        yield "**paper**", entry["paper"]
        yield "**slots**", ", ".join(entry["slots"]) or "none"
        yield "**hooks**", ", ".join(f"`{hook}`" for hook in ours) or "none"
        yield "**passes**", _passes(name)
        yield "**at inference**", _inference(name)
        if told := _training(name):
            yield "**training, measured**", f"{told} ({{doc}}`how </performance>`)"


def _own(method: type) -> list[type]:
    return [each for each in method.__mro__ if issubclass(each, TrainingStrategy) and each is not TrainingStrategy]


def _passes(name: str) -> str:
    few, many = (build_strategy(name).passes(exits) for exits in (4, 5))
    phases = build_strategy(name).phases(10, 5)
    told = (
        f"{many} over the data an epoch, with 5 exits (number of exits + {many - 5})" if few != many else "1 an epoch"
    )
    if few == many and len(phases) > 1:
        told += f"; {len(phases)} phases: " + ", ".join(f"{phase.name} ({phase.epochs} of 10)" for phase in phases)
    return told


def _training(name: str) -> str:
    """Say what training costs against joint training, as the page on performance has it from the benchmark."""
    for unit, line in (("step", rf"\| {name} \| ([\d.]+) \| ([\d.]+ to [\d.]+) \|"), ("epoch", EPOCH.format(name))):
        if found := re.search(line, PERFORMANCE):
            return f"{found[1]} times as long as a joint {unit}, 95 % interval {found[2]}"
    return ""


def _inference(name: str) -> str:
    """Say how much a method's network costs over the plain one, at its last exit."""
    more, of = MEASURED["added"].get(name), MEASURED["example"]
    if more is None or not any(more.values()):
        return "nothing is added to the network"
    told = [
        f"{100 * more[key] / of[key]:+.2f} % {what}"
        for key, what in (("macs", "multiply-adds"), ("params", "parameters"))
    ]
    return f"{', '.join(told)} (last exit of `{of['network']}`)"


class Presets(Table):
    """Every preset of a family."""

    headings = ("preset", "images, classes", "exits", "multiply-adds", "papers' count", "parameters", "what it is")
    numeric = frozenset({2, 3, 4, 5})

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return a row for each preset whose name begins with the argument."""
        for entry in entries("backbones"):
            if entry["name"].startswith(f"{name}-"):
                yield self._preset(entry["name"], entry["summary"])

    def _preset(self, name: str, summary: str) -> Sequence[str]:
        facts = MEASURED["presets"][name]
        spans = ["\u00a0– ".join(map(_short, facts[key])) for key in ("macs", "papers", "params")]
        images = "×".join(map(str, facts["images"]))
        return f"`{name}`", f"{images}, {facts['classes']}", str(facts["exits"]), *spans, summary


def _short(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.2f}\u00a0{unit}"
    return str(number)


def _entry(name: str) -> dict[str, Any]:
    """Return the catalogue's entry of a method, backbone or data set."""
    for kind in ("methods", "backbones", "datasets"):
        for entry in entries(kind):
            if entry["name"] == name:
                return entry
    raise ValueError(f"nothing is called {name}")


def setup(app: Any) -> dict[str, bool]:
    """Register the directives."""
    for name, directive in (("facts", Facts), ("fields", Fields), ("presets", Presets)):
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
