"""The catalogue of methods, backbones, data sets and recipes, as plain data.

It is cached on disk, because loading the plugins imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import site
import sys
import tomllib
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NotRequired

# Before Python 3.12 pydantic takes no other.
from typing_extensions import TypedDict

from exitkit import plugins
from exitkit.entry_points import OWN, foreign, installed, reason
from exitkit.errors import Note, UserError, unknown
from exitkit.files import checked, write_json
from exitkit.registration import Registration

Entry = dict[str, Any]
CATALOGUES = ("methods", "backbones", "datasets", "recipes")


GROUPS = {
    "phases": "phases",
    "logit link": "heads",
    "objective": "objectives",
    "exit weights": "weights",
    "gradient tap": "gradients",
    "update": "updates",
}
"""{slot: group of the methods that change it}; a method of several slots is in the first group."""


def venue(entry: Entry) -> str:
    """Return venue and year of a method's paper, such as "AAAI 2023"; "" if it names none."""
    found = re.search(r", ([^,;]+ \d{4})$", entry["paper"])
    return found[1] if found else ""


def entries(kind: str) -> list[Entry]:
    """Return the entries of one of `CATALOGUES`, one dictionary each, with at least `name` and `summary`.

    Methods, backbones and data sets also have `fields` (name, type, default, meaning), and presets their `family`;
    methods have their `paper`, `slots` and `group`; data sets have `house`, their default recipe.
    """
    if kind == "recipes":
        usable, faults = recipes()
        found = [_recipe_entry(name, path) for name, path in usable.items()]
        found += [{"name": name, "summary": f"not usable: {fault}", "values": {}} for name, fault in faults.items()]
        return sorted(found, key=lambda entry: entry["name"])
    # A script may register other classes under the same names, so that the cache would be out of date.
    scripted = any(isinstance(p, Registration) for plugin in plugins.KINDS for p in plugins.registered(plugin).values())
    catalogue = None if scripted else _stored()
    if catalogue is None:
        catalogue = {f"{plugin}s": [_entry(plugin, name) for name in plugins.names(plugin)] for plugin in plugins.KINDS}
        if not scripted:
            _store(catalogue)
    return catalogue[kind]


def outline(kind: str) -> dict[str, str]:
    """Return {name: summary} of one of `CATALOGUES` without importing a plugin.

    Until the catalogue is cached, summaries are empty and presets are missing.
    """
    if kind == "recipes":
        return dict.fromkeys(sorted(recipe_files()), "")
    known = {entry["name"]: entry["summary"] for entry in (_stored() or {}).get(kind, ())}
    return dict.fromkeys(plugins.registered(kind.removesuffix("s")), "") | known


def kind_of(name: str) -> str:
    """Return which of `CATALOGUES` has an entry of this name, or ""; no plugin is imported."""
    return next((kind for kind in CATALOGUES if name in outline(kind)), "")


def recipe_files() -> dict[str, Path]:
    """Return the usable installed recipes {name: TOML file}; see `recipes`."""
    return recipes()[0]


def recipes() -> tuple[dict[str, Path], dict[str, str]]:
    """Return the installed recipes, from the packages of the entry points `exitkit.recipes`.

    A recipe of exitkit is kept if another package has one of the same name.

    Returns:
        {name: TOML file}, and {name: reason} of the recipes and packages that are not usable.
    """
    places: dict[str, dict[Path, str]] = {}
    faults: dict[str, str] = {}
    for point in sorted(installed("exitkit.recipes"), key=lambda point: point.package != OWN):
        try:
            with foreign(f"the recipes of {point.value} do not load", point.package):
                found = [Path(str(file)) for file in files(point.value).iterdir() if file.name.endswith(".toml")]
        except UserError as error:
            faults[point.name] = str(error)
            continue
        for path in found:
            places.setdefault(path.stem, {})[path] = point.package
    recipes: dict[str, Path] = {}
    for name, packages in places.items():
        first, *others = packages
        recipes[name] = first
        if others and packages[first] != OWN:
            faults[name] = f"recipe {name!r} comes from several packages ({', '.join(map(str, packages))})"
            del recipes[name]
        elif others:
            notice = f"recipe {name!r} comes from several packages ({', '.join(map(str, packages))})"
            warnings.warn(Note(f"{notice}; that of exitkit is used"), stacklevel=1)
    return recipes, faults


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given as a path, a run folder or the name of an installed recipe.

    Raises:
        UserError: the name is unknown.
    """
    path = Path(name)
    if path.is_dir():
        return path / "recipe.json"
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    usable, faults = recipes()
    if name in faults:
        raise UserError(faults[name])
    if name not in usable:
        raise unknown("recipe", name, usable)
    return usable[name]


def _recipe_entry(name: str, path: Path) -> Entry:
    try:
        values = json.loads(json.dumps(tomllib.loads(path.read_text(encoding="utf-8"))))
        return {"name": name, "summary": str(values.get("title", "")), "values": values}
    except Exception as error:  # the file of another package may contain anything
        return {"name": name, "summary": f"not usable: {path}: {reason(error)}", "values": {}}


def make(kind: str, name: str) -> Any:
    """Return a plugin with the defaults of its fields.

    Raises:
        UserError: it can't be used; the message has the reason, and the package.
    """
    # Imported when used: most commands need only the names.
    from exitkit.data.base import build_dataset
    from exitkit.networks.build import make_backbone
    from exitkit.strategy.composition import build_strategy

    plugins.load(kind, name)
    with foreign(f"{plugins.WORDS[kind]} {name!r} can't be used", _package(kind, name)):
        if kind == "method":
            return build_strategy(name)
        return (make_backbone if kind == "backbone" else build_dataset)(name, {})


def _package(kind: str, name: str) -> str:
    """Return the package of a plugin; "" for presets, and for plugins of exitkit."""
    points = plugins.registered(kind)
    package = points[name].package if name in points else OWN
    return "" if package == OWN else package


class _Field(TypedDict):
    name: str
    type: str
    default: Any
    meaning: str
    variant: NotRequired[dict[str, Any]]


class _Entry(TypedDict):
    """The types of an entry's values; a package may provide others."""

    name: str
    summary: str
    fields: list[_Field]
    family: NotRequired[str]
    paper: NotRequired[str]
    slots: NotRequired[list[str]]
    group: NotRequired[str]
    house: NotRequired[dict[str, Any]]


def check(kind: str, name: str, *, whole: bool = True) -> Entry:
    """Return the entry of a plugin.

    Args:
        kind: the kind of plugin.
        name: its name.
        whole: also make an instance of a backbone or data set of exitkit, for which some load further libraries.

    Raises:
        UserError: it can't be used; the message has the reason, and the package.
    """
    plugin = plugins.load(kind, name)
    package = _package(kind, name)
    blank = make(kind, name) if whole or package or kind == "method" else None
    with foreign(f"{plugins.WORDS[kind]} {name!r} can't be listed", package):
        return _described(kind, plugin, name, blank)


def _entry(kind: str, name: str) -> Entry:
    """Return the entry of a plugin; if it can't be used, its summary states the reason, and it hides no other."""
    try:
        return check(kind, name, whole=False)
    except (Exception, SystemExit) as error:  # a package may raise anything
        return {
            "name": name,
            "summary": f"not usable: {' '.join(str(error).split()) or type(error).__name__}",
            "fields": [],
            "paper": "",
            "slots": [],
            "group": GROUPS["update"],
            "house": {},
        }


def _described(kind: str, plugin: Any, name: str, blank: Any) -> Entry:
    """Return the entry of a plugin, of which `blank` is an instance for methods."""
    entry: Entry = {"name": name, "summary": plugins.summary(plugin), "fields": plugins.describe(plugin)}
    if plugins.underlying(plugin) is not plugin:
        entry["family"] = _family(kind, plugins.underlying(plugin))
    if kind == "method":
        entry |= {"paper": blank.paper, "slots": sorted(blank.claims()), "group": _group(type(blank).slots)}
    if kind == "dataset":
        entry["house"] = dict(plugins.underlying(plugin).house)
    plain: Entry = json.loads(json.dumps(entry))
    checked(f"the entry of {name}", _Entry, plain)
    return plain


def _group(slots: frozenset[str]) -> str:
    return next((group for slot, group in GROUPS.items() if slot in slots), GROUPS["update"])


def _family(kind: str, plugin: type) -> str:
    """Return the name of the plugin that a preset belongs to, or "" if its class is not a plugin."""
    for name in plugins.registered(kind):
        with contextlib.suppress(UserError):  # a package that does not load is listed with its own error
            if plugins.load(kind, name) is plugin:
                return name
    return ""


def _fingerprint(catalogue: dict[str, list[Entry]]) -> str:
    """Return a hash that changes if the catalogue may be out of date or its cache was damaged.

    It covers versions, modification time and size of every file that defines entries, the installed packages, and the
    catalogue itself.
    """
    parts: list[str] = [version("exitkit"), sys.version, sys.prefix]
    parts += [_file_state(folder) for folder in map(Path, site.getsitepackages()) if folder.is_dir()]
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        parts.append(_file_state(path))
    for kind in plugins.KINDS:
        for point in installed(plugins.KINDS[kind]):
            file = _file_of(point.module)
            parts += [point.name, point.value, point.package, _file_state(file) if file else "gone"]
    parts.append(json.dumps(catalogue))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file_of(module: str) -> Path | None:
    """Return the file of a module, or None; only its top-level package is imported."""
    head, rest = module.split(".")[:2], module.split(".")[2:]
    try:
        with foreign(module):
            spec = find_spec(".".join(head))
    except UserError:  # it does not import, which its entry states
        return None
    if spec is None or not rest:
        return Path(spec.origin) if spec and spec.origin else None
    for folder in spec.submodule_search_locations or ():
        for file in (Path(folder, *rest).with_suffix(".py"), Path(folder, *rest, "__init__.py")):
            if file.is_file():
                return file
    return None


def _file_state(path: Path) -> str:
    status = path.stat()
    return f"{path}:{status.st_mtime_ns}:{status.st_size}"


def store() -> Path:
    """Return the file that caches the catalogue."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "exitkit" / "catalogue.json"


def _stored() -> dict[str, list[Entry]] | None:
    try:
        cached = json.loads(store().read_text(encoding="utf-8"))
        catalogue: dict[str, list[Entry]] = cached["catalogue"]
        return catalogue if cached["fingerprint"] == _fingerprint(catalogue) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: no home, or nested too deeply
        return None


def _store(catalogue: dict[str, list[Entry]]) -> None:
    # The cache is optional: if it can't be written, the catalogue is computed again on the next call.
    with contextlib.suppress(OSError, UserError, RuntimeError):
        store().parent.mkdir(parents=True, exist_ok=True)
        write_json(store(), {"fingerprint": _fingerprint(catalogue), "catalogue": catalogue})


def settings_of(entry: Entry) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and meaning of each field, as text."""
    for field in entry.get("fields", ()):
        yield field["name"], field["type"], _default(field), field["meaning"]


def _default(field: Entry) -> str:
    if field.get("variant"):
        return ", ".join(f"{_plain(value)} ({variant})" for variant, value in field["variant"].items())
    value = field["default"]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return _plain(value)


def _plain(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
