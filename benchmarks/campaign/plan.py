"""What a comparison is: a recipe whose method, network and data may be lists, with seeds and swept fields.

A TOML file of one has all keys of a run's recipe, and these:

title, note          what it is, and in what it differs from what it stands for
methods              names, or tables {name = ..., FIELD = ...}; a field may be the recipe's, too (`batch_size`)
backbone, dataset    a name, a list of names, or of such tables; `stands_for` there names what a paper has in its place
seeds                how many, from `seed` on
baseline             the method that differences are taken to; always among the methods
set                  fields of method, backbone or data set, set wherever there is such a field
sweep                {field: [values]}: every value (of several fields: every combination) is a run of its own
published            tables of the papers to stand beside ours, such as "boostnet/table1"
parts                tables of any of these and a run's keys, each over those above: the runs are those of all parts
static               true: also each exit as a network of its own, trained for it alone, as reference points
figures              "diagnose" (draws `exitkit diagnose` of each method), "toy" (the problem of two exits, alone)
report               options of `exitkit report`
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exitkit.cli.options import COMPARISON_KEYS
from exitkit.errors import UserError, unknown
from exitkit.plugins import check_value

if TYPE_CHECKING:
    from exitkit.runs.recipe import Recipe, ResolvedRecipe

BASELINE = "joint"
DEFAULT_METHODS = "ge,boostnet,metagf"
FIGURES = ("diagnose", "toy")


@dataclass(frozen=True)
class Entry:
    """A method, backbone or data set with some fields set; `stands_for` is what a paper has in its place."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    stands_for: str = ""


@dataclass(frozen=True)
class Planned:
    """One run to be: its resolved recipe, and the backbone and data set of the paper that it stands for, if others."""

    recipe: ResolvedRecipe
    stands_for: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """A comparison, checked key by key; `runs` resolves it into recipes."""

    methods: Sequence[Entry]
    backbones: Sequence[Entry | None]
    datasets: Sequence[Entry | None]
    base: Recipe
    seeds: int = 2
    baseline: str = BASELINE
    sets: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    static: bool = False
    published: Sequence[str] = ()
    figures: Sequence[str] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    note: str = ""
    parts: Sequence[Plan] = ()

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Plan:
        """Check the values of a comparison's recipe.

        Raises:
            UserError: unknown keys (the nearest are given) or impossible values; all that are wrong in one line.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.recipe import Recipe

        values = dict(values)
        parts = check_value("parts", list[dict[str, Any]], values.pop("parts", []))
        if any("parts" in part for part in parts):
            raise UserError("a part has parts; expected them side by side")
        own = {key: value for key, value in values.items() if key in COMPARISON_KEYS}
        run = {key: value for key, value in values.items() if key not in COMPARISON_KEYS}
        known = {*COMPARISON_KEYS, *Recipe.model_fields}
        bad = dict.fromkeys(key for table in (values, *parts) for key in table if key not in known)
        if bad:
            raise UserError("; ".join(str(unknown("key of a recipe", key, known)) for key in bad))
        backbones = _entries("backbone", run.pop("backbone", None))
        datasets = _entries("dataset", run.pop("dataset", None))
        baseline = check_value("baseline", str, own.get("baseline", BASELINE))
        plan = cls(
            methods=_with_baseline(_methods(own.get("methods", DEFAULT_METHODS)), baseline),
            backbones=backbones or [None],
            datasets=datasets or [None],
            base=Recipe.make(**run),
            baseline=baseline,
            **_checked(own),
            parts=_made([values | part for part in parts]),
        )
        plan._check()
        return plan

    def _check(self) -> None:
        # Imported when used: the command line's help must not load torch.
        from exitkit.benchmarks.published import tables
        from exitkit.benchmarks.report.options import ReportOptions

        if self.seeds < 1:
            raise UserError(f"seeds is {self.seeds}; expected at least 1")
        for name in self.published:
            if name not in tables():
                raise unknown("published table", name, tables())
        for name in self.figures:
            if name not in FIGURES:
                raise unknown("figure", name, FIGURES)
        for key, swept in self.sweep.items():
            if not swept:
                raise UserError(f"sweep of {key} is empty; expected its values")
        ReportOptions.make(self.report)

    def runs(self) -> list[Planned]:
        """Return all runs, resolved, in the order in which reports show them; each once.

        Raises:
            UserError: anything wrong with any of them, or a field that nothing here has.
        """
        used: set[str] = set()
        known: set[str] = set()
        parts = self.parts or [self]
        found = [each for part in parts for each in part._planned(used, known)]
        for part in parts:
            for key in (*part.sets, *part.sweep):
                if key not in used:
                    names = ", ".join(dict.fromkeys(method.name for method in part.methods))
                    raise unknown(f"field of {names} or their network and data", key, known)
        once: dict[str, Planned] = {}
        for each in found:
            once.setdefault(each.recipe.id, each)
        return list(once.values())

    def _planned(self, used: set[str], known: set[str]) -> Iterator[Planned]:
        """Yield the runs of a plan without parts, and note which of its set and swept keys mean a field."""
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.job import resolve

        for dataset, backbone in itertools.product(self.datasets, self.backbones):
            own = [(entry, kind) for entry, kind in ((dataset, "dataset"), (backbone, "backbone")) if entry]
            stands_for = {kind: entry.stands_for for entry, kind in own if entry.stands_for}
            base = self.base.with_values(**{kind: entry.name for entry, kind in own})
            for entry, kind in own:
                base = _with_fields(base, {_own(key, kind): value for key, value in entry.fields.items()})
            recipes = [each for method in self.methods for each in self._varied(base, method, used, known)]
            if self.static:
                varied = self._varied(base, Entry(BASELINE), used, known)
                recipes += [each for recipe in varied for each in _each_exit_alone(recipe)]
            for recipe in recipes:
                for seed in range(self.base.seed, self.base.seed + self.seeds):
                    yield Planned(resolve(recipe.with_values(seed=seed)), stands_for)

    def _varied(self, base: Recipe, method: Entry, used: set[str], known: set[str]) -> Iterator[Recipe]:
        """Yield a method's recipe with what is set, once for every combination of what is swept."""
        named = base.with_values(method=method.name)
        recipe = _with_fields(named, {_own(key, "method"): value for key, value in method.fields.items()})
        settable = recipe.settable() | _VALUES
        known |= settable | {f"{method.name}.{key}" for key in settable}
        for point in self._points(method.name, settable):
            chosen = _having(self.sets, method.name, settable) | point
            used |= {key for key in (*self.sets, *self.sweep) if _field(key, method.name, settable) in chosen}
            yield _with_fields(recipe, chosen)

    def _points(self, method: str, settable: set[str]) -> Iterator[dict[str, Any]]:
        """Yield every combination of those swept values that this method has fields for; without any, one empty one."""
        fields = {_field(key, method, settable): values for key, values in self.sweep.items()}
        fields.pop("", None)
        for values in itertools.product(*fields.values()):
            yield dict(zip(fields, values, strict=True))


def _made(parts: Sequence[Mapping[str, Any]]) -> list[Plan]:
    """Make all parts, or say in one line what is wrong with any."""
    made, wrong = [], []
    for part in parts:
        try:
            made.append(Plan.make(part))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(dict.fromkeys(wrong)))
    return made


_TYPES: dict[str, tuple[str, Any]] = {
    "seeds": ("seeds", int),
    "set": ("sets", dict[str, Any]),
    "sweep": ("sweep", dict[str, list[Any]]),
    "static": ("static", bool),
    "published": ("published", list[str]),
    "figures": ("figures", list[str]),
    "report": ("report", dict[str, Any]),
    "title": ("title", str),
    "note": ("note", str),
}
"""What the plan calls a key of a comparison's recipe, and its type."""


def _checked(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `_TYPES` that are given, by the plan's names.

    Raises:
        UserError: values of another type, all in one line.
    """
    found, wrong = {}, []
    for key, (name, kind) in _TYPES.items():
        if key in own:
            value = [own[key]] if kind == list[str] and isinstance(own[key], str) else own[key]
            try:
                found[name] = check_value(key, kind, value)
            except UserError as error:
                wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))
    return found


_VALUES = {"epochs", "batch_size", "lr", "schedule", "decay", "momentum", "weight_decay", "precision", "milestones"}
"""Keys of a run's recipe that an entry or a sweep may set."""


def _entries(kind: str, value: Any) -> list[Entry]:
    if value is None:
        return []
    values = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(values, list) or not values:
        raise UserError(f"{kind} is {value!r}; expected a name or a list of names")
    return [_entry(kind, item) for item in values]


def _entry(kind: str, item: Any) -> Entry:
    if isinstance(item, str) and item.strip():
        return Entry(item.strip())
    if isinstance(item, Mapping) and isinstance(item.get("name"), str):
        fields = {key: value for key, value in item.items() if key not in ("name", "stands_for")}
        return Entry(item["name"], fields, check_value(f"{kind}: stands_for", str, item.get("stands_for", "")))
    raise UserError(f"{kind} has {item!r}; expected a name, or a table with a name and fields")


def _methods(value: Any) -> list[Entry]:
    """Read names (text with commas between them, or a list) and tables; `all` is every method that can be had here."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")] if value.strip(" ,") else []
        if "" in value:
            raise UserError(
                f"methods has an empty name ({','.join(value)}); expected names with one comma between them"
            )
    if not value:
        raise UserError(f"methods is empty; expected names such as {DEFAULT_METHODS}, or all")
    if value == ["all"]:
        # Imported when used: the command line's help must not load torch.
        from exitkit.benchmarks.campaign.usable import usable
        from exitkit.plugins import registered

        value = usable(list(registered("method")))
    entries = _entries("methods", value)
    from exitkit.plugins import method_parts

    for entry in entries:
        method_parts(entry.name)
    return entries


def _with_baseline(entries: list[Entry], baseline: str) -> list[Entry]:
    # Imported when used: the command line's help must not load torch.
    from exitkit.plugins import method_parts

    method_parts(baseline)
    first = [entry for entry in entries if entry.name == baseline] or [Entry(baseline)]
    rest = [entry for entry in entries if entry.name != baseline]
    unique: list[Entry] = []
    for entry in [*first, *rest]:
        if entry not in unique:
            unique.append(entry)
    return unique


def _own(key: str, kind: str) -> str:
    """Return an entry's own field by its full name, one of the recipe's by its own."""
    return key if key in _VALUES or key.startswith(f"{kind}.") else f"{kind}.{key}"


def _each_exit_alone(recipe: Recipe) -> Iterator[Recipe]:
    """Yield joint training of a recipe's network with the weight on a single exit, for every exit."""
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.job import count_exits, resolve

    exits = count_exits(resolve(recipe))
    for only in range(exits):
        yield recipe.with_settings({"method.weights": [float(k == only) for k in range(exits)]})


def _field(key: str, method: str, settable: set[str]) -> str:
    """Return the field of `method` that `key` (perhaps `method.field`) means, "" if there is none."""
    prefix, dot, rest = key.partition(".")
    if key in settable:
        return key
    return rest if dot and prefix == method and rest in settable else ""


def _having(sets: Mapping[str, Any], method: str, settable: set[str]) -> dict[str, Any]:
    # `boostnet.temperature` says which method is meant, and goes before `temperature`.
    ordered = sorted(sets, key=lambda key: "." in key)
    found = {_field(key, method, settable): sets[key] for key in ordered}
    found.pop("", None)
    return found


def _with_fields(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    values = {key: value for key, value in fields.items() if key in _VALUES}
    settings = {key: value for key, value in fields.items() if key not in _VALUES}
    return recipe.with_values(**{key: _typed(key, value) for key, value in values.items()}).with_settings(settings)


def _typed(key: str, value: Any) -> Any:
    """Read text from the command line as the type of a recipe's key."""
    if not isinstance(value, str):
        return value
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.recipe import Recipe

    return check_value(key, Recipe.model_fields[key].annotation, value)
