"""The recipe of a comparison: the recipe of a run with lists of methods, networks and data sets, seeds and sweeps.

Its TOML file has the keys of a run's recipe and the following ones:

title, note          title of the comparison, and how it differs from the experiment in the paper
methods              names, or tables {name = ..., FIELD = ...}; FIELD is a method's field or a recipe's (`batch_size`)
backbone, dataset    a name, or a list of names or such tables; `stands_for` is the name of the paper's one
seeds                number of seeds, starting at `seed`
baseline             method that differences refer to; it is always trained
set                  values of fields of methods, backbones or data sets; used by those that have the field
sweep                {field: [values]}: one run per value, or per combination of values of several fields
published            the papers' tables to compare with, such as "boostnet/table1"
parts                tables of these keys and a run's keys, which override the keys above; all parts are trained
static               true: also train one static network per exit, for reference
figures              "diagnose" (`exitkit diagnose` for each method), or "toy" (only the toy problem of two exits)
report               options of `exitkit report`
policy               exit policies to compare on the outputs of every method, as `policy` of report
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exitkit.cli.options import BASELINE, COMPARISON_KEYS, DEFAULT_METHODS
from exitkit.errors import UserError, unknown
from exitkit.plugins import check_value

if TYPE_CHECKING:
    from exitkit.runs.recipe import Recipe, ResolvedRecipe

FIGURES = ("diagnose", "toy")


@dataclass(frozen=True)
class Entry:
    """A method, backbone or data set with values of fields; `stands_for` is the name of the paper's one."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    stands_for: str = ""


@dataclass(frozen=True)
class Planned:
    """A planned run.

    Attributes:
        recipe: its resolved recipe.
        stands_for: the paper's "backbone" and "dataset" that it stands for, if different.
        given: its recipe before it was resolved.
    """

    recipe: ResolvedRecipe
    stands_for: Mapping[str, str]
    given: Recipe


@dataclass(frozen=True)
class Plan:
    """The validated recipe of a comparison; `runs` returns the recipes of its runs."""

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
        """Validate the values of a comparison's recipe.

        Raises:
            UserError: keys are unknown (similar ones are suggested) or values are invalid; the message lists all.
        """
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.recipe import Recipe

        values = dict(values)
        parts = check_value("parts", list[dict[str, Any]], values.pop("parts", []))
        if any("parts" in part for part in parts):
            raise UserError("a part has parts; expected all parts at the top level")
        comparison = {key: value for key, value in values.items() if key in COMPARISON_KEYS}
        run = {key: value for key, value in values.items() if key not in COMPARISON_KEYS}
        known = {*COMPARISON_KEYS, *Recipe.model_fields}
        bad = dict.fromkeys(key for table in (values, *parts) for key in table if key not in known)
        if bad:
            raise UserError("; ".join(str(unknown("key of a recipe", key, known)) for key in bad))
        if any("method" in table for table in (values, *parts)):
            raise UserError("method is a key of a run's recipe; expected methods, a list of names, for a comparison")
        backbones = _entries("backbone", run.pop("backbone", None))
        datasets = _entries("dataset", run.pop("dataset", None))
        baseline = check_value("baseline", str, comparison.get("baseline", BASELINE))
        plan = cls(
            methods=_with_baseline(_methods(comparison.get("methods", DEFAULT_METHODS)), baseline),
            backbones=backbones or [None],
            datasets=datasets or [None],
            base=Recipe.make(**run),
            baseline=baseline,
            **_checked(comparison),
            parts=_make_parts([values | part for part in parts]),
        )
        plan._check()
        beside = [key for key in values if key not in ("figures", "title", "note")]
        if "toy" in plan.figures and beside:
            raise UserError(f"figures has toy, which is drawn alone; expected no {beside[0]} beside it")
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
        if "toy" in self.figures and len(self.figures) > 1:
            raise UserError(f"figures is {list(self.figures)}; expected toy alone, or others")
        for key, swept in self.sweep.items():
            if not swept:
                raise UserError(f"sweep of {key} is empty; expected a list of values")
        ReportOptions.make(self.report)

    def runs(self) -> list[Planned]:
        """Return all runs, resolved and without duplicates, in the order of the report.

        Raises:
            UserError: a recipe is invalid, or no run has a field of `set` or `sweep`.
        """
        used: set[str] = set()
        known: set[str] = set()
        parts = self.parts or [self]
        runs = [run for part in parts for run in part._planned(used, known)]
        reference = self.report.get("baseline")
        methods = dict.fromkeys(run.recipe.method for run in runs)
        if reference and str(reference).split(" ")[0] not in methods:
            raise unknown("baseline of the report", str(reference), methods)
        for part in parts:
            for key in (*part.sets, *part.sweep):
                if key not in used and key in known:
                    raise UserError(f"{key} has no effect in any run; leave it out, or set what it needs")
                if key not in used:
                    names = ", ".join(dict.fromkeys(method.name for method in part.methods))
                    raise unknown(f"field of {names} or their network and data", key, known)
        unique: dict[str, Planned] = {}
        for run in runs:
            unique.setdefault(run.recipe.id, run)
        return list(unique.values())

    def _planned(self, used: set[str], known: set[str]) -> Iterator[Planned]:
        """Yield the runs of a plan without parts; add used keys of `set` and `sweep` to `used`, fields to `known`."""
        # Imported when used: the command line's help must not load torch.
        from exitkit.runs.job import resolve

        for dataset, backbone in itertools.product(self.datasets, self.backbones):
            entries = [(entry, kind) for entry, kind in ((dataset, "dataset"), (backbone, "backbone")) if entry]
            stands_for = {kind: entry.stands_for for entry, kind in entries if entry.stands_for}
            base = self.base.with_values(**{kind: entry.name for entry, kind in entries})
            for entry, kind in entries:
                base = _with_fields(base, {_full_key(key, kind): value for key, value in entry.fields.items()})
            recipes = [recipe for method in self.methods for recipe in self._varied(base, method, used, known)]
            if self.static:
                varied = self._varied(base, Entry(BASELINE), used, known)
                recipes += [static for recipe in varied for static in _static_recipes(recipe)]
            for recipe in recipes:
                for seed in range(self.base.seed, self.base.seed + self.seeds):
                    given = recipe.with_values(seed=seed)
                    yield Planned(resolve(given), stands_for, given)

    def _varied(self, base: Recipe, method: Entry, used: set[str], known: set[str]) -> Iterator[Recipe]:
        """Yield the recipe of a method with the values of `set`, once per combination of swept values.

        Values of both that have no effect beside the others (`sharpness` of `cgt` with `gate=hard`) are left out.
        """
        named = base.with_values(method=method.name)
        recipe = _with_fields(named, {_full_key(key, "method"): value for key, value in method.fields.items()})
        settable = recipe.settable() | _VALUES
        known |= settable | {f"{method.name}.{key}" for key in settable}
        self._check_swept(method.name, settable)
        for point in self._points(method.name, settable):
            chosen = _applicable(self.sets, method.name, settable) | point
            chosen = _effective(recipe, chosen)
            used |= {key for key in (*self.sets, *self.sweep) if _field(key, method.name, settable) in chosen}
            yield _with_fields(recipe, chosen)

    def _check_swept(self, method: str, settable: set[str]) -> None:
        """Raise UserError if a value of `set` has no effect because its field is swept.

        `boostnet.temperature` names the method and overrides `temperature`, in `set` and in `sweep`.
        """
        for key in self.sets:
            swept = key.removeprefix(f"{method}.")
            other = key if key in self.sweep else swept if swept in self.sweep else ""
            if other and _field(key, method, settable):
                both = key if key == other else f"{key}, or {other},"
                raise UserError(f"{both} is given by --set and by --sweep; expected one of them")

    def _points(self, method: str, settable: set[str]) -> Iterator[dict[str, Any]]:
        """Yield each combination of swept values of this method's fields; one empty combination if none is swept."""
        own = {key: values for key, values in self.sweep.items() if f"{method}.{key}" not in self.sweep}
        fields = {_field(key, method, settable): values for key, values in own.items()}
        fields.pop("", None)
        for values in itertools.product(*fields.values()):
            yield dict(zip(fields, values, strict=True))


def _make_parts(parts: Sequence[Mapping[str, Any]]) -> list[Plan]:
    """Return the plans of all parts, or raise one UserError with the errors of all parts."""
    plans, errors = [], []
    for part in parts:
        try:
            plans.append(Plan.make(part))
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("; ".join(dict.fromkeys(errors)))
    return plans


_TYPES: dict[str, tuple[str, Any]] = {
    "seeds": ("seeds", int),
    "set": ("sets", dict[str, Any]),
    "sweep": ("sweep", dict[str, list[Any]]),
    "static": ("static", bool),
    "published": ("published", list[str]),
    "figures": ("figures", list[str]),
    "report": ("report", dict[str, Any]),
    "policy": ("policy", list[str]),
    "title": ("title", str),
    "note": ("note", str),
}
"""{key of a comparison's recipe: (attribute of `Plan`, type)}."""


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values of the keys in `_TYPES`, by attribute of `Plan`.

    Raises:
        UserError: values have the wrong type; the message lists all of them.
    """
    values, errors = {}, []
    for key, (name, kind) in _TYPES.items():
        if key in given:
            value = [given[key]] if kind == list[str] and isinstance(given[key], str) else given[key]
            try:
                values[name] = check_value(key, kind, value)
            except UserError as error:
                errors.append(str(error))
    if errors:
        raise UserError("; ".join(errors))
    if policy := values.pop("policy", None):
        values["report"] = {**values.get("report", {}), "policy": policy}
    return values


_VALUES = {
    *("epochs", "batch_size", "lr", "schedule", "decay", "momentum", "weight_decay", "precision", "milestones"),
    *("optimizer", "warmup", "trunk_lr_factor", "mixup", "cutmix", "weight_ema"),
}
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
    """Parse method names (comma-separated text or a list) and tables; `all` means every installed method."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")] if value.strip(" ,") else []
        if "" in value:
            raise UserError(f"methods has an empty name ({','.join(value)}); expected comma-separated names")
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


def _full_key(key: str, kind: str) -> str:
    """Return `kind.field` for a field of an entry; keys of the recipe are unchanged."""
    return key if key in _VALUES or key.startswith(f"{kind}.") else f"{kind}.{key}"


def _static_recipes(recipe: Recipe) -> Iterator[Recipe]:
    """Yield one recipe per exit: joint training with weight 1 on that exit and 0 on the others."""
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.job import count_exits, resolve

    exits = count_exits(resolve(recipe))
    for trained in range(exits):
        yield recipe.with_settings({"method.weights": [float(k == trained) for k in range(exits)]})


def _field(key: str, method: str, settable: set[str]) -> str:
    """Return the field of `method` for `key` (`field` or `method.field`); "" if the method has no such field."""
    prefix, dot, rest = key.partition(".")
    if key in settable:
        return key
    return rest if dot and prefix == method and rest in settable else ""


def _applicable(sets: Mapping[str, Any], method: str, settable: set[str]) -> dict[str, Any]:
    # `boostnet.temperature` names the method, and overrides `temperature`.
    ordered = sorted(sets, key=lambda key: "." in key)
    values = {_field(key, method, settable): sets[key] for key in ordered}
    values.pop("", None)
    return values


def _effective(recipe: Recipe, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that have an effect in the recipe with all of them."""
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.job import without_effect

    return without_unused(fields, without_effect(_with_fields(recipe, fields)) if fields else {})


def without_unused(fields: Mapping[str, Any], unused: Iterable[str]) -> dict[str, Any]:
    """Return the fields without the unused ones, which are named `field`, or `part.field` in a composition."""
    names = {name for key in unused for name in (key, key.rpartition(".")[2])}
    return {key: value for key, value in fields.items() if key.removeprefix("method.") not in names}


def _with_fields(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    values = {key: value for key, value in fields.items() if key in _VALUES}
    settings = {key: value for key, value in fields.items() if key not in _VALUES}
    typed = {key: recipe.typed(key, value) for key, value in values.items()}
    return recipe.with_values(**typed).with_settings(settings)
