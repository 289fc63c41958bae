"""The catalogue of methods, backbones, data sets and recipes, as plain data.

It is cached on disk, because loading the plugins imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exitkit import plugins
from exitkit.errors import UserError, unknown
from exitkit.files import write_json

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
        return [_recipe_entry(name, path) for name, path in sorted(recipe_files().items())]
    catalogue = _stored()
    if catalogue is None:
        catalogue = {f"{plugin}s": [_entry(plugin, name) for name in plugins.names(plugin)] for plugin in plugins.KINDS}
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
    """Return the installed recipes {name: TOML file}, from the packages of the entry points `exitkit.recipes`."""
    recipes: dict[str, Path] = {}
    for point in entry_points(group="exitkit.recipes"):
        for resource in files(point.value).iterdir():
            if resource.name.endswith(".toml"):
                recipes[resource.name.removesuffix(".toml")] = Path(str(resource))
    return recipes


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
    installed = recipe_files()
    if name not in installed:
        raise unknown("recipe", name, installed)
    return installed[name]


def _recipe_entry(name: str, path: Path) -> Entry:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    return {"name": name, "summary": values.get("title", ""), "values": values}


def _entry(kind: str, name: str) -> Entry:
    try:
        plugin = plugins.load(kind, name)
        entry: Entry = {"name": name, "summary": plugins.summary(plugin), "fields": plugins.describe(plugin)}
        if plugins.underlying(plugin) is not plugin:
            entry["family"] = _family(kind, plugins.underlying(plugin))
        if kind == "method":
            blank = plugins.configure(kind, name, {})
            entry |= {"paper": blank.paper, "slots": sorted(blank.claims()), "group": _group(type(blank).slots)}
        if kind == "dataset":
            entry["house"] = dict(plugins.underlying(plugin).house)
        plain: Entry = json.loads(json.dumps(entry))
    except Exception as error:
        # A package that does not load must not hide the others; its summary states the error.
        return {
            "name": name,
            "summary": f"not usable: {error}",
            "fields": [],
            "paper": "",
            "slots": [],
            "group": GROUPS["update"],
            "house": {},
        }
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

    It covers versions, modification time and size of every file that defines entries, and the catalogue itself.
    """
    parts: list[str] = [version("exitkit"), sys.version, sys.prefix]
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        parts.append(_file_state(path))
    for kind in plugins.KINDS:
        for name, point in plugins.registered(kind).items():
            file = _file_of(point.module)
            parts += [name, point.value, _file_state(file) if file else "gone"]
    parts.append(json.dumps(catalogue))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file_of(module: str) -> Path | None:
    """Return the file of a module, or None; only its top-level package is imported."""
    head, rest = module.split(".")[:2], module.split(".")[2:]
    try:
        spec = find_spec(".".join(head))
    except (ImportError, ValueError):
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
