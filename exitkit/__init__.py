"""exitkit: train multi-exit networks with the published methods, and compare them under one recipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module and name in it: imported on first use, so that the command line answers before torch is loaded.
_PUBLIC = {
    "AdaptiveInference": ("exitkit.inference.adaptive", "AdaptiveInference"),
    "ExitPolicy": ("exitkit.inference.policy", "ExitPolicy"),
    "ExitRule": ("exitkit.inference.rule", "ExitRule"),
    "LearnedTable": ("exitkit.strategy.base", "LearnedTable"),
    "MultiExitNetwork": ("exitkit.networks.cascade", "MultiExitNetwork"),
    "Phase": ("exitkit.strategy.base", "Phase"),
    "Recipe": ("exitkit.runs.recipe", "Recipe"),
    "Run": ("exitkit.strategy.run", "Run"),
    "RunFolder": ("exitkit.runs.folder", "RunFolder"),
    "TrainingStrategy": ("exitkit.strategy.base", "TrainingStrategy"),
    "UserError": ("exitkit.errors", "UserError"),
    "attach_exits": ("exitkit.networks.attach.exits", "attach_exits"),
    "build_network": ("exitkit.networks.build", "build_network"),
    "build_strategy": ("exitkit.strategy.composition", "build_strategy"),
    "cost": ("exitkit.networks.costs", "cost"),
    "evaluate": ("exitkit.runs.evaluate", "evaluate"),
    "find_runs": ("exitkit.runs.table", "find_runs"),
    "load_data": ("exitkit.runs.job", "load_run_data"),
    "load_network": ("exitkit.runs.job", "load_network"),
    "load_released_weights": ("exitkit.networks.released.weights", "load_released_weights"),
    "load_runs": ("exitkit.runs.table", "load_runs"),
    "prune_to": ("exitkit.networks.pruning", "prune_to"),
    "register": ("exitkit.plugins", "register"),
    "run_command": ("exitkit.cli", "run_command"),
    "setting": ("exitkit.plugins", "setting"),
    "train": ("exitkit.training.loop", "train"),
}

# Constructors of a class that need rooms above its own: class -> its attribute -> where the function is.
_CONSTRUCTORS = {
    "ExitPolicy": {
        "from_run": ("exitkit.inference.choose", "policy_of_run"),
        "from_outputs": ("exitkit.inference.choose", "policy_of_outputs"),
    },
    "ExitRule": {
        "from_run": ("exitkit.inference.choose", "rule_of_run"),
        "from_outputs": ("exitkit.inference.choose", "rule_of_outputs"),
    },
    "Recipe": {"resolve": ("exitkit.runs.job", "resolve")},
    "Run": {"local": ("exitkit.training.local", "local_run")},
}

if TYPE_CHECKING:
    from exitkit.cli import run_command
    from exitkit.errors import UserError
    from exitkit.inference.adaptive import AdaptiveInference
    from exitkit.inference.policy import ExitPolicy
    from exitkit.inference.rule import ExitRule
    from exitkit.networks.attach.exits import attach_exits
    from exitkit.networks.build import build_network
    from exitkit.networks.cascade import MultiExitNetwork
    from exitkit.networks.costs import cost
    from exitkit.networks.pruning import prune_to
    from exitkit.networks.released.weights import load_released_weights
    from exitkit.plugins import register, setting
    from exitkit.runs.evaluate import evaluate
    from exitkit.runs.folder import RunFolder
    from exitkit.runs.job import load_network
    from exitkit.runs.job import load_run_data as load_data
    from exitkit.runs.recipe import Recipe
    from exitkit.runs.table import find_runs, load_runs
    from exitkit.strategy.base import LearnedTable, Phase, TrainingStrategy
    from exitkit.strategy.composition import build_strategy
    from exitkit.strategy.run import Run
    from exitkit.training.loop import train

__all__ = [
    "AdaptiveInference",
    "ExitPolicy",
    "ExitRule",
    "LearnedTable",
    "MultiExitNetwork",
    "Phase",
    "Recipe",
    "Run",
    "RunFolder",
    "TrainingStrategy",
    "UserError",
    "attach_exits",
    "build_network",
    "build_strategy",
    "cost",
    "evaluate",
    "find_runs",
    "load_data",
    "load_network",
    "load_released_weights",
    "load_runs",
    "prune_to",
    "register",
    "run_command",
    "setting",
    "train",
]


_ROOMS = ("data", "networks")
"""Packages whose names the documents write out: `exitkit.data.from_datasets`."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"exitkit.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'exitkit' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    for constructor, (place, function) in _CONSTRUCTORS.get(name, {}).items():
        made = getattr(import_module(place), function)
        setattr(value, constructor, made if constructor == "resolve" else staticmethod(made))
    globals()[name] = value  # over a submodule of the same name, and without this function next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


# Modules of release 0.1 that its tutorials imported -> where their names are now. They work for one more release.
_MOVED = {
    "exitkit.backbones": ("exitkit.networks",),
    "exitkit.backbones.attach": ("exitkit.networks",),
    "exitkit.backbones.base": ("exitkit.networks", "exitkit.networks.families.base"),
    "exitkit.build": ("exitkit", "exitkit.data.base"),
    "exitkit.catalogue": ("exitkit.cli.catalogue",),
    "exitkit.costs": ("exitkit.networks",),
    "exitkit.evaluation": ("exitkit.inference.thresholds", "exitkit.inference.scores"),
    "exitkit.exit_outputs": ("exitkit", "exitkit.runs.job", "exitkit.runs.evaluate"),
    "exitkit.exit_rules": ("exitkit.inference.scores",),
    "exitkit.gradients": ("exitkit.networks",),
    "exitkit.network": ("exitkit.networks",),
    "exitkit.recipe": ("exitkit", "exitkit.runs.recipe"),
    "exitkit.run": ("exitkit", "exitkit.strategy"),
}


class _MovedModule(ModuleType):
    """Stands in for a module of release 0.1: every name comes from its new place, with a warning that names it."""

    def __getattr__(self, name: str) -> Any:
        for place in () if name.startswith("__") else _MOVED[self.__name__]:
            module = import_module(place)
            if hasattr(module, name):
                said = f"{self.__name__}.{name} is now {place}.{name}; the old name goes with the next release"
                warnings.warn(said, DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _MovedFinder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self, is_package=True) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: names are looked up when they are asked for."""


sys.meta_path.append(_MovedFinder())
