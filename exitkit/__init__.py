"""exitkit: train multi-exit networks with every published method, and compare them under one recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> the module it lives in: imported on first use, so that the command line answers before torch is loaded.
_PUBLIC = {
    "AdaptiveInference": "exitkit.inference.adaptive",
    "ExitRule": "exitkit.inference.rule",
    "attach_exits": "exitkit.backbones.attach",
    "build_network": "exitkit.build",
    "build_strategy": "exitkit.build",
    "train": "exitkit.training",
    "evaluate": "exitkit.exit_outputs",
    "load_released_weights": "exitkit.released_weights",
    "load_runs": "exitkit.runs",
    "RunFolder": "exitkit.runs",
    "cost": "exitkit.costs",
    "prune_to": "exitkit.pruning",
    "Run": "exitkit.run",
    "Recipe": "exitkit.recipe",
    "MultiExitNetwork": "exitkit.network",
    "TrainingStrategy": "exitkit.strategy",
    "Phase": "exitkit.strategy",
    "setting": "exitkit.plugins",
    "UserError": "exitkit.errors",
}

if TYPE_CHECKING:
    from exitkit.backbones.attach import attach_exits
    from exitkit.build import build_network, build_strategy
    from exitkit.costs import cost
    from exitkit.errors import UserError
    from exitkit.exit_outputs import evaluate
    from exitkit.inference.adaptive import AdaptiveInference
    from exitkit.inference.rule import ExitRule
    from exitkit.network import MultiExitNetwork
    from exitkit.plugins import setting
    from exitkit.pruning import prune_to
    from exitkit.recipe import Recipe
    from exitkit.released_weights import load_released_weights
    from exitkit.run import Run
    from exitkit.runs import RunFolder, load_runs
    from exitkit.strategy import Phase, TrainingStrategy
    from exitkit.training import train

__all__ = [
    "AdaptiveInference",
    "ExitRule",
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
    "load_released_weights",
    "load_runs",
    "prune_to",
    "setting",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'exitkit' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value  # over the submodule of the same name (`exitkit.cost`), and found at once next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
