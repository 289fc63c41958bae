"""The catalogue of methods, backbones, data sets and recipes, as plain data.

It is stored between calls, because loading the plugins imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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


def entries(kind: str) -> list[Entry]:
    """Return what there is of one of `CATALOGUES`: a dict each, with at least its `name` and `summary`.

    Methods, backbones and data sets also have `fields` (name, type, default, meaning), and a preset its `family`;
    methods have their `paper` and `slots`; data sets the `house` recipe that is used with them.
    """
    if kind == "recipes":
        return [_recipe_entry(name, path) for name, path in sorted(recipe_files().items())]
    whole = _stored()
    if whole is None:
        whole = {f"{each}s": [_entry(each, name) for name in plugins.names(each)] for each in plugins.KINDS}
        _store(whole)
    return whole[kind]


def outline(kind: str) -> dict[str, str]:
    """Return {name: summary} of one of `CATALOGUES` at once: no plugin is imported.

    Until the catalogue is stored, summaries are empty and presets are missing.
    """
    if kind == "recipes":
        return dict.fromkeys(sorted(recipe_files()), "")
    known = {entry["name"]: entry["summary"] for entry in (_stored() or {}).get(kind, ())}
    return dict.fromkeys(plugins.registered(kind.removesuffix("s")), "") | known


def kind_of(name: str) -> str:
    """Return which of `CATALOGUES` has an entry of this name, "" if none has; no plugin is imported."""
    return next((kind for kind in CATALOGUES if name in outline(kind)), "")


def recipe_files() -> dict[str, Path]:
    """Return the shipped recipes {name: TOML file}: those in the packages of the entry points `exitkit.recipes`."""
    found: dict[str, Path] = {}
    for point in entry_points(group="exitkit.recipes"):
        for resource in files(point.value).iterdir():
            if resource.name.endswith(".toml"):
                found[resource.name.removesuffix(".toml")] = Path(str(resource))
    return found


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, a run folder (its own recipe), or the name of a shipped one.

    Raises:
        UserError: neither.
    """
    path = Path(name)
    if path.is_dir():
        return path / "recipe.json"
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    shipped = recipe_files()
    if name not in shipped:
        raise unknown("recipe", name, shipped)
    return shipped[name]


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
            entry |= {"paper": blank.paper, "slots": sorted(blank.claims())}
        if kind == "dataset":
            entry["house"] = dict(plugins.underlying(plugin).house)
        plain: Entry = json.loads(json.dumps(entry))
    except Exception as error:
        # One package that is broken, however, must not hide the others; what is wrong stands in its place.
        return {
            "name": name,
            "summary": f"not usable: {error}",
            "fields": [],
            "paper": "",
            "slots": [],
            "house": {},
        }
    return plain


def _family(kind: str, plugin: type) -> str:
    """Return the name that a preset's own class goes by, if it has one."""
    for name in plugins.registered(kind):
        with contextlib.suppress(UserError):  # another package's fault, shown where it is listed itself
            if plugins.load(kind, name) is plugin:
                return name
    return ""


def _fingerprint(whole: dict[str, list[Entry]]) -> str:
    """Return what changes whenever the answer might, or is no longer the one that was written down.

    Versions, age and size of every file that gives it, and the answer itself.
    """
    parts: list[str] = [version("exitkit"), sys.version, sys.prefix]
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        parts.append(_age(path))
    for kind in plugins.KINDS:
        for name, point in plugins.registered(kind).items():
            file = _file_of(point.module)
            parts += [name, point.value, _age(file) if file else "gone"]
    parts.append(json.dumps(whole))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file_of(module: str) -> Path | None:
    """Return the file of a module; nothing below its top-level package is imported."""
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


def _age(path: Path) -> str:
    status = path.stat()
    return f"{path}:{status.st_mtime_ns}:{status.st_size}"


def store() -> Path:
    """Return the file in which the catalogue is remembered."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "exitkit" / "catalogue.json"


def _stored() -> dict[str, list[Entry]] | None:
    try:
        stored = json.loads(store().read_text(encoding="utf-8"))
        whole: dict[str, list[Entry]] = stored["catalogue"]
        return whole if stored["fingerprint"] == _fingerprint(whole) else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: no home, or nested too deeply
        return None


def _store(whole: dict[str, list[Entry]]) -> None:
    # Only ever a convenience: a cache that can't be written is asked for again next time.
    with contextlib.suppress(OSError, UserError, RuntimeError):
        store().parent.mkdir(parents=True, exist_ok=True)
        write_json(store(), {"fingerprint": _fingerprint(whole), "catalogue": whole})


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
