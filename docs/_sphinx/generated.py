"""Directives for tables from exitkit's catalogue, and from the results of `measure.py` and `families.py`.

{facts} ge           paper, slots, hooks, passes over the data, and what the method adds to a network
{fields} ge          every field of a method, backbone or data set, with type, default and meaning (several names: one
                     table each)
{presets} msdnet     every preset of a family, with the costs of its first and last exit
{families} timm      every network of a library that exits were attached to, with the result of each check
{keys} run           every key of a run's recipe (`report`: of the table `report` of a comparison's recipe)
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

from exitkit import Recipe, build_strategy
from exitkit.benchmarks.report.options import ReportOptions
from exitkit.cli.catalogue import entries, settings_of
from exitkit.cli.train import train
from exitkit.data import DataSet
from exitkit.plugins import describe, load, type_name, underlying
from exitkit.runs.recipe import SETTABLE
from exitkit.strategy import TrainingStrategy

HOOKS = (
    "adapt",
    "prepare",
    "exit_losses",
    "exit_weights",
    "observe",
    "train_step",
    "train_epoch",
    "phases",
    "passes",
    "teacher_runs",
    "ingredients",
    "refuses",
    "learned",
    "sample_weights",
)
MEASURED = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))
"""The counts that `measure.py` wrote."""
FAMILIES = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))
"""The results that `families.py` wrote."""
PERFORMANCE = Path(__file__).parents[1].joinpath("performance.md").read_text(encoding="utf-8")
TARGETS = "`--budget`, `--latency`, `--latency-p95`, `--lose`, `--accuracy`"
"""Options of the key `targets` of a report."""
EPOCH = r"\| {}: an epoch, in joint epochs[^|]*\|[^|]*\| ([\d.]+) \| ([\d.]+ to [\d.]+) \|"


class Table(Directive):
    """A directive that makes a table from rows of MyST text."""

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
        tables: list[nodes.Node] = []
        for name in names:
            if len(names) > 1:
                tables += self._parsed(f"`{name}`")
            tables.append(self._table(list(self.rows(name))))
        return tables

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
        for column, cell in enumerate(cells):
            entry = nodes.entry(classes=["number"] if column in self.numeric else [])
            row += entry
            entry += self._parsed(cell)
        return row

    def _parsed(self, text: str) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList([text], "generated"), self.content_offset, container)
        return list(container.children)


class Fields(Table):
    """The fields of a method, backbone or data set."""

    headings = ("field", "type", "default", "meaning")

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return one row per field."""
        for field, kind, default, meaning in settings_of(_entry(name)):
            if field != "label_smoothing" or name == "joint":
                yield f"`{field}`", kind, f"`{default}`" if default else "", meaning
        if "slots" in _entry(name) and name != "joint":
            yield "`label_smoothing`", "number", "`0.0`", "a field of every method: see {doc}`joint </methods/joint>`"


class Facts(Table):
    """Properties of a method that its class reports."""

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return (fact, value) rows."""
        entry, method = _entry(name), underlying(load("method", name))
        overridden = [hook for hook in HOOKS if any(hook in vars(base) for base in _method_classes(method))]
        yield "**paper**", entry["paper"]
        yield "**slots**", ", ".join(entry["slots"]) or "none"
        yield "**hooks**", ", ".join(f"`{hook}`" for hook in overridden) or "none"
        yield "**passes**", _passes(name)
        yield "**at inference**", _inference(name)
        if ratio := _training(name):
            yield "**training, measured**", f"{ratio} ({{doc}}`how it is measured </performance>`)"


def _method_classes(method: type) -> list[type]:
    """Return the class of a method and those of its bases that override hooks."""
    return [base for base in method.__mro__ if issubclass(base, TrainingStrategy) and base is not TrainingStrategy]


def _passes(name: str) -> str:
    strategy = build_strategy(name)
    few, many = strategy.passes(4), strategy.passes(5)
    if few != many:
        return f"{many} per epoch with 5 exits (number of exits + {many - 5})"
    phases = strategy.phases(10, 5)
    lengths = ", ".join(f"{phase.name} ({phase.epochs} of 10)" for phase in phases)
    return f"1 per epoch; {len(phases)} phases: {lengths}" if len(phases) > 1 else "1 per epoch"


def _training(name: str) -> str:
    """Return the cost of training relative to joint training, as the benchmark's table in performance.md has it."""
    for unit, line in (("step", rf"\| {name} \| ([\d.]+) \| ([\d.]+ to [\d.]+) \|"), ("epoch", EPOCH.format(name))):
        if match := re.search(line, PERFORMANCE):
            return f"{match[1]} times as long as a joint {unit}, 95 % interval {match[2]}"
    return ""


def _inference(name: str) -> str:
    """Return how much a method adds to the cost of a network, at its last exit."""
    added, plain = MEASURED["added"].get(name), MEASURED["example"]
    if added is None or not any(added.values()):
        return "nothing is added to the network"
    shares = [
        f"{100 * added[key] / plain[key]:+.2f} % {noun}"
        for key, noun in (("macs", "multiply-adds"), ("params", "parameters"))
    ]
    return f"{', '.join(shares)} (last exit of `{plain['network']}`)"


class Presets(Table):
    """The presets of a family."""

    headings = ("preset", "images, classes", "exits", "multiply-adds", "papers' count", "parameters", "description")
    numeric = frozenset({2, 3, 4, 5})

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return one row per preset whose name begins with the argument."""
        for entry in entries("backbones"):
            if entry["name"].startswith(f"{name}-"):
                yield self._preset(entry["name"], entry["summary"])

    def _preset(self, name: str, summary: str) -> Sequence[str]:
        counts = MEASURED["presets"][name]
        ranges = ["\u00a0– ".join(map(_short, counts[key])) for key in ("macs", "papers", "params")]
        images = "×".join(map(str, counts["images"]))
        return f"`{name}`", f"{images}, {counts['classes']}", str(counts["exits"]), *ranges, summary


class Families(Table):
    """The networks of a library that exits were attached to."""

    headings = ("family", "network", "pixels", "exits at", "result")
    numeric = frozenset({2})

    def run(self) -> list[nodes.Node]:
        """Return the number of networks that pass every check, and the table."""
        results = [_result(row) for row in FAMILIES[self.arguments[0]].values()]
        return [*self._parsed(f"{results.count('✓')} of {len(results)} networks pass every check."), *super().run()]

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return one row per network: a tick, or what fails and why."""
        for row in FAMILIES[name].values():
            shares = ", ".join(f"{share:.2f}" for share in row.get("shares", ()))
            yield row["family"], f"`{row['network']}`", str(row["side"]), shares, _result(row)


class Keys(Table):
    """The keys of a run's recipe, or of the table `report` of a comparison's recipe."""

    headings = ("key", "default", "on the command line", "meaning")

    def rows(self, name: str) -> Iterable[Sequence[str]]:
        """Return one row per key."""
        if name == "report":
            for key, kind, default, meaning in settings_of({"fields": describe(ReportOptions)}):
                yield (
                    f"`{key}`",
                    f"`{default}`",
                    TARGETS if key == "targets" else f"`--{key}`",
                    meaning + _choices(kind),
                )
            return
        options = {option for parameter in train.params for option in parameter.opts}
        for key, value in Recipe.model_fields.items():
            option = f"--{key.replace('_', '-')}"
            setting = f"`--set {key}=`" if key in SETTABLE else "`--set`" if key.endswith("_settings") else ""
            default = "none" if value.default is None else f"`{json.dumps(value.default)}`"
            yield (
                f"`{key}`",
                "the data set's" if key in DataSet.house or key == "backbone" else default,
                f"`{option}`" if option in options else setting,
                (value.description or "") + _choices(type_name(value.annotation)),
            )


def _choices(kind: str) -> str:
    """Return the values that a field can have, unless they are `true | false`."""
    return f" ({kind})" if "|" in kind and kind != "true | false" else ""


def _result(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    return "; ".join(f"{check}: {reason}" for check, reason in row["results"].items() if reason) or "✓"


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
    raise ValueError(f"no method, backbone or data set is called {name}")


def setup(app: Any) -> dict[str, bool]:
    """Register the directives."""
    directives = {"facts": Facts, "fields": Fields, "presets": Presets, "families": Families, "keys": Keys}
    for name, directive in directives.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
