"""Methods, backbones and data sets, found by name through entry points or `register`, and their fields.

A plugin is a dataclass; its fields are its settings, each declared with `setting(default, meaning)`. An entry
point refers to the class or to a `functools.partial` of it (the same fields with other defaults). A class may also have
`presets`, a dictionary of such partials by name. exitkit finds its own plugins in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from exitkit import registration
from exitkit.entry_points import Point, by_name, foreign, installed, reason, several
from exitkit.errors import Note, UserError, unknown
from exitkit.registration import Registration

KINDS = {"method": "exitkit.methods", "backbone": "exitkit.backbones", "dataset": "exitkit.datasets"}
"""The entry-point group of each kind of plugin."""

Plugin = typing.TypeVar("Plugin", bound=type)

WORDS = {"method": "method", "backbone": "backbone", "dataset": "data set"}
"""The word for each kind of plugin in messages."""


def setting(
    default: Any,
    meaning: str,
    *,
    variant: Mapping[str, Any] | None = None,
    execution: bool = False,
    added: bool = False,
    earlier: Any = None,
    kw_only: bool = False,
    search: tuple[float, float] | tuple[float, float, str] | None = None,
    needs: Mapping[str, tuple[Any, ...]] | None = None,
) -> Any:
    """Declare a field of a plugin.

    Args:
        default: the default; None together with `variant` selects the value of the plugin's variant.
        meaning: one line for `exitkit list` and the documentation.
        variant: the value of the field in each variant ("paper", "released"); see `resolve_variant`.
        execution: the field changes how the work is done but no result; it is not part of a run's identity.
        added: the field is newer than the plugin, and its default keeps the earlier behaviour; at its default it is
            not part of a run's identity.
        earlier: the value of an added field that keeps the earlier behaviour, if its default does not. Recipes of runs
            of earlier releases, which list all other fields, get this value; it is not part of a run's identity.
        kw_only: the field is common to a whole kind of plugin, and is listed after the plugin's own fields.
        search: the range that `exitkit tune` searches by default, (low, high) or (low, high, "log").
        needs: {another field: its values with which this field has an effect}, which the meaning then names; with
            others, a recipe that changes this field is refused.
    """
    for other, values in (needs or {}).items():
        meaning += f" (with {other}={written(values)})"
    metadata = {
        "meaning": meaning,
        "variant": dict(variant or {}),
        "execution": execution,
        "added": added,
        "search": search,
        "needs": dict(needs or {}),
    }
    metadata |= {} if earlier is None else {"earlier": earlier}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def written(values: Iterable[Any]) -> str:
    """Return values as text: predicted or frozen, true, none."""
    plain = (str(value).lower() if value is None or isinstance(value, bool) else str(value) for value in values)
    return " or ".join(plain)


def resolve_variant(plugin: Any) -> None:
    """Set each field that is None to its value in `plugin.variant` (call it in `__post_init__`)."""
    for field in dataclasses.fields(plugin):
        choices = field.metadata.get("variant", {})
        if choices and getattr(plugin, field.name) is None:
            object.__setattr__(plugin, field.name, choices[plugin.variant])


def forwards(*sources: type, without: tuple[str, ...] = ()) -> Callable[[Plugin], Plugin]:
    """Add the settings of other dataclasses to a plugin (apply it below `@dataclass`).

    Every field of the sources that the class does not declare becomes a field of the class, with the same type, default
    and meaning; `forwarded(plugin, source)` returns their values.

    Args:
        sources: dataclasses; if several declare a field of the same name, the first is used.
        without: names of fields that are not added.
    """

    def add(cls: Plugin) -> Plugin:
        annotations = inspect.get_annotations(cls)
        for source in sources:
            hints = typing.get_type_hints(source)
            for name, field in fields(source).items():
                if name not in annotations and name not in without and not field.kw_only:
                    annotations[name] = hints[name]
                    setattr(cls, name, dataclasses.field(default=field.default, metadata=field.metadata))
        cls.__annotations__ = annotations
        return cls

    return add


def forwarded(plugin: Any, source: type) -> dict[str, Any]:
    """Return the values of the fields of `source` that `plugin` has, as keyword arguments of `source`."""
    return {name: getattr(plugin, name) for name in fields(source) if name in fields(type(plugin))}


def register(kind: str, name: str, plugin: Any) -> None:
    """Register a data set, a network family or a method of a script, so that it can be used by its name.

    Worker processes of `exitkit compare` import the script by its path, so that everything but imports, definitions and
    calls of `register` must be below `if __name__ == "__main__":`. Commands import the scripts in the environment
    variable EXITKIT_SCRIPTS. Packages use entry points instead. Registering the same name again replaces the plugin.

    Args:
        kind: `dataset`, `backbone` (or `network`), or `method`.
        name: the name.
        plugin: a dataclass derived from `DataSet`, `Backbone` or `TrainingStrategy`, or a `functools.partial` of it.

    Raises:
        UserError: the kind is unknown, the name is that of an installed plugin, or the plugin is not a dataclass.
    """
    kind = {"network": "backbone"}.get(kind, kind)
    if kind not in KINDS:
        raise unknown("kind of plugin", kind, KINDS)
    if same := _installed(kind).get(name):
        raise UserError(f"{WORDS[kind]} {name!r} exists already ({same[0].value}); choose another name")
    if problem := _problem(plugin):
        raise UserError(f"{WORDS[kind]} {name!r} {problem}")
    script = sys._getframe(1).f_globals.get("__file__")
    registration.add(kind, name, plugin, script and str(Path(script).resolve()))
    registered.cache_clear()
    load.cache_clear()


@functools.cache
def registered(kind: str) -> dict[str, Point | Registration]:
    """Return {name: entry point} of every installed or registered plugin of this kind, sorted by name."""
    points: dict[str, Point | Registration] = {**registration.registrations(kind)}
    points |= {name: same[0] for name, same in _installed(kind).items()}
    return dict(sorted(points.items()))


def check_importable(kind: str, name: str) -> None:
    """Check that other processes can find a plugin.

    Raises:
        UserError: it was registered in a notebook or an interactive session, which they can't import.
    """
    for part in method_parts(name) if kind == "method" else [name.partition(":")[0]]:
        point = registered(kind).get(part)
        if isinstance(point, Registration) and point.script is None:
            raise UserError(
                f"{WORDS[kind]} {part!r} was registered outside a file, so that worker processes can't import it; "
                "register it in a script, or use --launcher here"
            )


def _installed(kind: str) -> dict[str, list[Point]]:
    """Return {name: entry points} of the installed plugins of a kind; several if packages have the same name."""
    return by_name(installed(KINDS[kind]))


@functools.cache
def load(kind: str, name: str) -> Any:
    """Return the plugin called `name`: a dataclass, or a `functools.partial` of one.

    A plugin with a `named_by` field is also found as `plugin:value`, with that field set (`torchvision:resnet18`).

    Raises:
        UserError: the name is unknown (the message gives the nearest names), several packages provide it, or its
            package does not import or does not provide a dataclass.
    """
    points = registered(kind)
    if not isinstance(name, str):
        raise unknown(WORDS[kind], name, names(kind))
    family, colon, value = name.partition(":")
    if colon and family in points and (field := getattr(underlying(load(kind, family)), "named_by", "")):
        return functools.partial(load(kind, family), **{field: value})
    if name not in points:
        preset = _find_preset(kind, name)
        if preset is None:
            raise unknown(WORDS[kind], name, names(kind))
        return preset
    same = _installed(kind).get(name, [])
    if len(same) > 1:
        raise UserError(several(f"{WORDS[kind]} {name!r}", same))
    label, package = f"{WORDS[kind]} {name!r} ({points[name].value})", points[name].package
    with foreign(f"{label} does not load", package):
        plugin = points[name].load()
        problem = _problem(plugin)
    if problem:
        raise UserError(f"{label} {problem}" + (f" (package {package})" if package else ""))
    return plugin


def _problem(plugin: Any) -> str:
    """Return why an object can't be a plugin, or ""."""
    cls = underlying(plugin)
    if not isinstance(cls, type):
        return f"is not a dataclass but {cls!r:.60}; expected a class decorated with @dataclass(eq=False)"
    # Without the decorator a class inherits its base's fields, and its own fields would be ignored.
    unused = [key for key, value in vars(cls).items() if isinstance(value, dataclasses.Field)]
    if dataclasses.is_dataclass(cls) and not unused:
        return ""
    ignored = f": its settings ({', '.join(unused)}) would be ignored" if unused else ""
    return f"is not a dataclass{ignored}; decorate it with @dataclass(eq=False)"


def presets(kind: str, family: str) -> Mapping[str, Any]:
    """Return the presets {name: preset} of an installed family; empty if its package does not load."""
    try:
        known: Any = vars(underlying(load(kind, family))).get("presets", {})
    except UserError:
        return {}
    return {str(name): preset for name, preset in known.items()} if isinstance(known, Mapping) else {}


def _find_preset(kind: str, name: str) -> Any:
    """Return a preset, or None if it does not exist."""
    # Families that the name begins with are loaded first; usually no other package is loaded.
    for family in sorted(registered(kind), key=lambda family: not name.startswith(f"{family}-")):
        if name in (known := presets(kind, family)):
            return known[name]
    return None


def names(kind: str) -> list[str]:
    """Return the names of all plugins of this kind, presets included; this loads every package."""
    return sorted({*registered(kind), *(name for family in registered(kind) for name in presets(kind, family))})


def identifying(kind: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plugin that are part of a run's identity.

    Settings of execution, and added settings at their default, are excluded. Removed settings of earlier releases are
    included with their fixed value. A run therefore keeps its identity across releases. If the plugin is not installed,
    or can't be used (which gives a `Note`), all settings are returned.
    """
    try:
        plugin = load(kind, name)
    except UserError as error:
        if name in registered(kind):
            warnings.warn(Note(f"all settings of runs are compared: {error}"), stacklevel=2)
        return dict(values)
    known, usual = fields(plugin), defaults(plugin)
    kept = {
        key: value
        for key, value in values.items()
        if key not in known or not (known[key].metadata.get("execution") or _as_before(known[key], value, usual[key]))
    }
    removed: Mapping[str, Any] = getattr(underlying(plugin), "removed", {})
    return {**removed, **kept}


def _as_before(field: dataclasses.Field[Any], value: Any, default: Any) -> bool:
    """Whether a value of an added field keeps the behaviour that the plugin had before it."""
    return bool(field.metadata.get("added")) and value in (default, field.metadata.get("earlier", default))


def _completed(known: Mapping[str, dataclasses.Field[Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a run, which list all fields, with those of fields that its release did not have."""
    later = {name: field.metadata["earlier"] for name, field in known.items() if "earlier" in field.metadata}
    first = {name for name, field in known.items() if not field.metadata.get("added")}
    whole = bool(later) and first <= values.keys()
    return {**later, **values} if whole else dict(values)


def underlying(plugin: Any) -> Any:
    """Return the dataclass of a plugin, which is a class or a preset of it."""
    return plugin.func if isinstance(plugin, functools.partial) else plugin


def fields(plugin: Any) -> dict[str, dataclasses.Field[Any]]:
    """Return the settable fields of a plugin by name."""
    declared = sorted(dataclasses.fields(underlying(plugin)), key=lambda field: bool(field.kw_only))
    return {field.name: field for field in declared if field.init}


def defaults(plugin: Any) -> dict[str, Any]:
    """Return the default of each field; a preset's values override those of its class."""
    overrides = plugin.keywords if isinstance(plugin, functools.partial) else {}
    return {name: overrides.get(name, _default(field)) for name, field in fields(plugin).items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def configure(kind: str, name: str, values: Mapping[str, Any]) -> Any:
    """Make the plugin called `name` with these values of its fields; the others have their defaults.

    Raises:
        UserError: a field is unknown (the message gives the nearest names), or a value has the wrong type or is out of
            range.
    """
    return instantiate(load(kind, name), f"{WORDS[kind]} {name}", values)


def instantiate(plugin: Any, label: str, values: Mapping[str, Any]) -> Any:
    """Make `plugin` from `values`; strings (from the command line) are converted to the field's type.

    Settings that the plugin lists in `removed` are ignored: earlier releases had them, and they changed no result.

    Raises:
        UserError: see `configure`.
    """
    with foreign(label):
        known = fields(plugin)
        removed: Mapping[str, Any] = dict(getattr(underlying(plugin), "removed", {}))
        hints = typing.get_type_hints(underlying(plugin))
    for name in removed.keys() & values.keys():
        if values[name] != removed[name]:
            notice = f"{name}={values[name]} of {label} no longer exists and is ignored: it changed no result"
            warnings.warn(Note(notice), stacklevel=3)
    values = _completed(known, {name: value for name, value in values.items() if name not in removed})
    for name in values:
        if name not in known:
            raise unknown(f"field of {label}", name, known)
    checked = {name: check_value(f"{label}: {name}", hints[name], value) for name, value in values.items()}
    try:
        return plugin(**checked)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{label}: {error}") from error
    except (Exception, SystemExit) as error:  # a plugin of another package may raise anything
        raise UserError(f"{label}: {reason(error)}") from error


def check_value(label: str, kind: Any, value: Any) -> Any:
    """Return `value` converted to type `kind`.

    Where a tuple is expected, a string may be a list separated by commas or dashes ("1,2,4", "1-2-4").

    Raises:
        UserError: the value is not of this type; the message states the expected type.
    """
    # Imported when used: the help pages must not load pydantic.
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    with foreign(f"{label} has a type that can't be checked"):
        adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    candidates = [value]
    if isinstance(value, str) and value.lower() in ("none", "null"):
        candidates = [None, value]
    elif isinstance(value, str) and any(typing.get_origin(part) is tuple for part in _parts(kind)):
        separator = "-" if re.fullmatch(r"\d+(-\d+)+", value) else ","
        candidates = [value, [piece.strip() for piece in value.split(separator)]]
    if isinstance(value, bool) and bool not in _parts(kind):
        candidates = []  # pydantic would convert it to 0 or 1
    for candidate in candidates:
        with contextlib.suppress(ValidationError):
            return adapter.validate_python(candidate)
    raise UserError(f"{label} is {value!r}; expected {type_name(kind)}")


def describe(plugin: Any) -> list[dict[str, Any]]:
    """Return one dictionary per field: name, type, default, meaning (and its value in each variant, if any)."""
    hints = typing.get_type_hints(underlying(plugin))
    values = defaults(plugin)
    return [
        {
            "name": name,
            "type": type_name(hints[name]),
            "default": values[name],
            "meaning": field.metadata.get("meaning", ""),
            **({"variant": field.metadata["variant"]} if field.metadata.get("variant") else {}),
        }
        for name, field in fields(plugin).items()
    ]


def type_name(kind: Any) -> str:
    """Return a readable name of a type: `paper | released`, `number`, `number, ...`."""
    names: dict[Any, str] = {
        float: "number",
        int: "integer",
        bool: "true | false",
        str: "text",
        type(None): "none",
    }
    if kind in names:
        return names[kind]
    parts = _parts(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"{type_name(typing.get_args(kind)[0])}, ..."
    if len(parts) > 1:
        return " | ".join(type_name(part) for part in parts if part is not type(None))
    return str(getattr(kind, "__name__", kind))


def method_parts(name: str) -> list[str]:
    """Split `a+b` into the names of its methods.

    Raises:
        UserError: a part is empty, unknown or named twice.
    """
    known = registered("method")
    if not isinstance(name, str):
        raise unknown("method", name, known)
    names = [part.strip() for part in name.split("+")]
    for part in names:
        if part not in known:
            raise unknown("method", part, known)
    if len(set(names)) < len(names):
        raise UserError(f"method {name!r} names a part twice; expected each part once")
    return names


def summary(plugin: Any) -> str:
    """Return the first line of a plugin's docstring (of a preset: of its `doc`, if it has one)."""
    text = getattr(plugin, "doc", None) or inspect.getdoc(underlying(plugin)) or ""
    return str(text).strip().split("\n", 1)[0]


def _parts(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union type, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)
