"""Methods, backbones and data sets, found by name through entry points, and their fields.

A plugin is a dataclass; its fields are its settings, each declared with `setting(default, meaning)`. What an entry
point names may be the class itself or a `functools.partial` of it (the same fields, other defaults). A class may also
have `presets`, a dictionary of such partials by name. Our own plugins are found like anyone else's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from exitkit.errors import Note, UserError, unknown

KINDS = {"method": "exitkit.methods", "backbone": "exitkit.backbones", "dataset": "exitkit.datasets"}
"""The kinds of plugin and the entry-point group of each."""

Plugin = typing.TypeVar("Plugin", bound=type)

WORDS = {"method": "method", "backbone": "backbone", "dataset": "data set"}


def setting(
    default: Any,
    meaning: str,
    *,
    variant: Mapping[str, Any] | None = None,
    execution: bool = False,
    added: bool = False,
    kw_only: bool = False,
) -> Any:
    """Declare a field of a plugin.

    Args:
        default: its default; None together with `variant` means "as the variant says".
        meaning: one line for `exitkit list` and the docs.
        variant: the value that each variant ("paper", "released") stands for; see `resolve_variant`.
        kw_only: it is common to a whole kind of plugin, and stands behind each one's own fields.
        execution: it says how the work is done and changes no result, so that it is no part of a run's identity.
        added: it is newer than the plugin, and its default does what runs did before it: then it is no part of their
            identity.
    """
    metadata = {"meaning": meaning, "variant": dict(variant or {}), "execution": execution, "added": added}
    return dataclasses.field(default=default, metadata=metadata, kw_only=kw_only)


def resolve_variant(plugin: Any) -> None:
    """Fill each field left at None with what `plugin.variant` stands for (call it in `__post_init__`)."""
    for field in dataclasses.fields(plugin):
        choices = field.metadata.get("variant", {})
        if choices and getattr(plugin, field.name) is None:
            object.__setattr__(plugin, field.name, choices[plugin.variant])


def forwards(*sources: type, without: tuple[str, ...] = ()) -> Callable[[Plugin], Plugin]:
    """Give a plugin the settings of others, to hand them on (apply it below `@dataclass`).

    Every field of the sources that the class has not itself becomes a field of the class, with the same type, default
    and meaning; `forwarded(plugin, source)` returns their values.

    Args:
        sources: dataclasses; of two fields of one name the first counts.
        without: names of fields that are not forwarded.
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
    """Return the values of those fields of `source` that `plugin` has, to make a `source` of them."""
    return {name: getattr(plugin, name) for name in fields(source) if name in fields(type(plugin))}


@functools.cache
def registered(kind: str) -> dict[str, EntryPoint]:
    """Return {name: entry point} of everything of this kind that is installed, by name."""
    return {point.name: point for point in sorted(entry_points(group=KINDS[kind]), key=lambda point: point.name)}


def _rivals(kind: str, name: str) -> list[str]:
    """Return what the entry points called `name` stand for; one package seen twice on the path is one."""
    return sorted({point.value for point in entry_points(group=KINDS[kind], name=name)})


@functools.cache
def load(kind: str, name: str) -> Any:
    """Return the plugin called `name`: a dataclass, or a `functools.partial` of one.

    A plugin with a `named_by` field also answers to `plugin:value`, with that field set (`torchvision:resnet18`).

    Raises:
        UserError: no such name (the nearest are given), one that several packages claim, or one whose package does
            not import or gives no dataclass.
    """
    points = registered(kind)
    family, colon, value = name.partition(":")
    if colon and family in points and (field := getattr(underlying(load(kind, family)), "named_by", "")):
        return functools.partial(load(kind, family), **{field: value})
    if name not in points:
        preset = _find_preset(kind, name)
        if preset is None:
            raise unknown(WORDS[kind], name, names(kind))
        return preset
    rivals = _rivals(kind, name)
    if len(rivals) > 1:
        raise UserError(
            f"{WORDS[kind]} {name!r} comes from several packages ({', '.join(rivals)}); uninstall all but one"
        )
    try:
        plugin = points[name].load()
    except Exception as error:  # whatever someone's module raises while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{WORDS[kind]} {name!r} ({points[name].value}) does not load: {reason}") from error
    known = underlying(plugin)
    # A class without the decorator inherits its base's fields, and its own would be passed over.
    bare = [key for key, value in vars(known).items() if isinstance(value, dataclasses.Field)]
    if not dataclasses.is_dataclass(known) or bare:
        lost = f": its settings ({', '.join(bare)}) would be lost" if bare else ""
        told = f"{WORDS[kind]} {name!r} ({points[name].value}) is no dataclass{lost}"
        raise UserError(f"{told}; decorate it with @dataclass(eq=False)")
    return plugin


def presets(kind: str, family: str) -> Mapping[str, Any]:
    """Return the presets of an installed family by name; empty where its package does not load."""
    try:
        found: Mapping[str, Any] = vars(underlying(load(kind, family))).get("presets", {})
    except UserError:
        return {}
    return found


def _find_preset(kind: str, name: str) -> Any:
    """Return a preset, or None; a family whose name the preset's begins with is loaded first, and most often alone."""
    for family in sorted(registered(kind), key=lambda family: not name.startswith(f"{family}-")):
        if name in (known := presets(kind, family)):
            return known[name]
    return None


def names(kind: str) -> list[str]:
    """Return the names of everything of this kind, presets included; this loads every package."""
    return sorted({*registered(kind), *(name for family in registered(kind) for name in presets(kind, family))})


def identifying(kind: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of a plugin that make a run what it is.

    Left out are settings that only say how the work is done, and added ones at their default; settings that an earlier
    release had come with the value that they would have. So a run keeps its identity from release to release. Of a
    plugin that is not installed all settings count.
    """
    try:
        plugin = load(kind, name)
    except UserError:
        return dict(values)
    known, usual = fields(plugin), defaults(plugin)
    kept = {
        key: value
        for key, value in values.items()
        if key not in known
        or not (known[key].metadata.get("execution") or (known[key].metadata.get("added") and value == usual[key]))
    }
    removed: Mapping[str, Any] = getattr(underlying(plugin), "removed", {})
    return {**removed, **kept}


def underlying(plugin: Any) -> Any:
    """Return the dataclass of a plugin, be it the class or a preset of it."""
    return plugin.func if isinstance(plugin, functools.partial) else plugin


def fields(plugin: Any) -> dict[str, dataclasses.Field[Any]]:
    """Return the settable fields of a plugin by name."""
    declared = sorted(dataclasses.fields(underlying(plugin)), key=lambda field: bool(field.kw_only))
    return {field.name: field for field in declared if field.init}


def defaults(plugin: Any) -> dict[str, Any]:
    """Return each field's default, a preset's own included."""
    given = plugin.keywords if isinstance(plugin, functools.partial) else {}
    return {name: given.get(name, field.default) for name, field in fields(plugin).items()}


def configure(kind: str, name: str, values: Mapping[str, Any]) -> Any:
    """Make the plugin called `name` with some of its fields set.

    Raises:
        UserError: an unknown field (the nearest are given), a value of the wrong type or out of range.
    """
    return instantiate(load(kind, name), f"{WORDS[kind]} {name}", values)


def instantiate(plugin: Any, label: str, values: Mapping[str, Any]) -> Any:
    """Make `plugin` from `values`; strings (from the command line) are read as the field's type.

    Settings that the plugin names in `removed` are left out: earlier releases had them, and they changed no result.
    """
    known = fields(plugin)
    removed: Mapping[str, Any] = getattr(underlying(plugin), "removed", {})
    for name in removed.keys() & values.keys():
        if values[name] != removed[name]:
            said = f"{name}={values[name]} of {label} no longer exists, and is left out: it changed no result"
            warnings.warn(Note(said), stacklevel=3)
    values = {name: value for name, value in values.items() if name not in removed}
    for name in values:
        if name not in known:
            raise unknown(f"field of {label}", name, known)
    hints = typing.get_type_hints(underlying(plugin))
    checked = {name: check_value(f"{label}: {name}", hints[name], value) for name, value in values.items()}
    try:
        return plugin(**checked)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{label}: {error}") from error


def check_value(label: str, kind: Any, value: Any) -> Any:
    """Return `value` as type `kind`, or raise one line that says what was expected.

    A string may be a comma- or dash-separated list where a tuple is expected ("1,2,4", "1-2-4").
    """
    # Imported when used: the command line's help must not load pydantic.
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
    candidates = [value]
    if isinstance(value, str) and value.lower() in ("none", "null"):
        candidates = [None, value]
    elif isinstance(value, str) and any(typing.get_origin(part) is tuple for part in _parts(kind)):
        separator = "-" if re.fullmatch(r"\d+(-\d+)+", value) else ","
        candidates = [value, [piece.strip() for piece in value.split(separator)]]
    if isinstance(value, bool) and bool not in _parts(kind):
        candidates = []  # pydantic would take it for 0 or 1
    for candidate in candidates:
        with contextlib.suppress(ValidationError):
            return adapter.validate_python(candidate)
    raise UserError(f"{label} is {value!r}; expected {type_name(kind)}")


def describe(plugin: Any) -> list[dict[str, Any]]:
    """Return one row a field: name, type, default, meaning (and what each variant stands for)."""
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
    """Write a type as a person would: `paper | released`, `number`, `number, ... `."""
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
    """Split `a+b` into its methods.

    Raises:
        UserError: an empty part, an unknown one, or one named twice.
    """
    names = [part.strip() for part in name.split("+")]
    known = registered("method")
    for part in names:
        if part not in known:
            raise unknown("method", part, known)
    if len(set(names)) < len(names):
        raise UserError(f"method {name!r} names a part twice; each part counts once")
    return names


def summary(plugin: Any) -> str:
    """Return the first line of a plugin's documentation (a preset's own `doc`, if it has one)."""
    text = getattr(plugin, "doc", None) or inspect.getdoc(underlying(plugin)) or ""
    return str(text).strip().split("\n", 1)[0]


def _parts(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)
