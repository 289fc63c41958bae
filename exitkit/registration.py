"""Plugins that a script registers, and how other processes find them.

`exitkit.register` adds a plugin to this process, and the path of the script that called it to the environment variable
EXITKIT_SCRIPTS. Processes that are started later inherit the variable, and import these scripts before they look for a
plugin; so do commands, if it is set in the shell.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exitkit.errors import UserError

VARIABLE = "EXITKIT_SCRIPTS"


@dataclass(frozen=True)
class Registration:
    """A registered plugin, with the attributes of an entry point that are used.

    Attributes:
        name: its name.
        plugin: the class, or a `functools.partial` of it.
        script: the file that registered it; None: a notebook or an interactive session.
    """

    name: str
    plugin: Any
    script: str | None
    package = ""

    @property
    def module(self) -> str:
        """The module of the class."""
        return str(getattr(self.plugin, "func", self.plugin).__module__)

    @property
    def value(self) -> str:
        """The module and the name of the class."""
        return f"{self.module}:{getattr(self.plugin, 'func', self.plugin).__qualname__}"

    def load(self) -> Any:
        """Return the plugin."""
        return self.plugin


_registrations: dict[tuple[str, str], Registration] = {}
_imported: set[str] = set()
_importing: list[str] = []


def add(kind: str, name: str, plugin: Any, script: str | None) -> None:
    """Add a plugin; one of the same name, such as that of a notebook's cell that runs again, is replaced.

    Raises:
        UserError: the name can't be used.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"name is {name!r}; expected letters, digits, dots, dashes or underscores")
    _registrations[kind, name] = Registration(name, plugin, script)
    if script is None or script in _imported:
        return
    _imported.add(script)
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*map(str, _listed()), script]))


def registrations(kind: str) -> dict[str, Registration]:
    """Return {name: registration} of the plugins of a kind, after importing the scripts of the environment variable.

    Raises:
        UserError: a script does not load, or trains when it is imported.
    """
    if _importing:
        raise UserError(
            f"{_importing[-1]} uses exitkit while its plugins are registered; put all but register below "
            "if __name__ == '__main__':"
        )
    for path in _listed():
        if str(path) not in _imported:
            _import(path)
    return {name: registration for (known, name), registration in _registrations.items() if known == kind}


def _listed() -> list[Path]:
    """Return the scripts of the environment variable."""
    return [Path(path).resolve() for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _import(path: Path) -> None:
    root, name = path.parent, path.stem
    while (root / "__init__.py").is_file():  # a module of a package, which may import its neighbours
        root, name = root.parent, f"{root.name}.{name}"
    if name in sys.modules:  # such as a script called test.py
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{VARIABLE} names {path}, which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(root))
    _importing.append(path.name)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script may raise any error
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        raise UserError(f"script {path} does not load ({type(error).__name__}: {error})") from error
    finally:
        _importing.pop()
    _imported.add(str(path))
