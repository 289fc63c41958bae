"""Counts costs for the tables of the site, which would take too long in a build: `python docs/_sphinx/measure.py`.

Writes measured.json beside this file: the costs of every preset's exits, and what each method adds to a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from exitkit import build_network, build_strategy, cost
from exitkit.networks import ExitCost
from exitkit.networks.families.base import home
from exitkit.plugins import load, names, registered, underlying

MEASURED = Path(__file__).with_name("measured.json")
EXAMPLE = "msdnet-cifar-lg5"
"""The network for which the cost of methods is counted."""


def presets() -> list[str]:
    """Return the names of all networks, except those of libraries, which have names of their own."""
    return [name for name in names("backbone") if not hasattr(underlying(load("backbone", name)), "named_by")]


def preset(name: str) -> dict[str, Any]:
    """Return a preset's images, classes, and the costs of its first and last exit."""
    shape, classes = home(load("backbone", name))
    with torch.device("meta"):
        costs = cost(build_network(name))
    ranges = {key: [getattr(costs[index], key) for index in (0, -1)] for key in ("macs", "papers", "params")}
    return {"images": list(shape), "classes": classes, "exits": len(costs), **ranges}


def adapted(method: str | None) -> ExitCost:
    """Return the cost of the example's last exit, with the parts that a method adds to the network."""
    with torch.device("meta"):
        network = build_network(EXAMPLE)
        for phase in build_strategy(method).phases(10, network.num_exits) if method else ():
            phase.strategy.adapt(network)
    return cost(network)[-1]


def added(method: str, plain: ExitCost) -> dict[str, int]:
    """Return how many multiply-adds and parameters a method adds."""
    total = adapted(method)
    return {"macs": total.macs - plain.macs, "params": total.params - plain.params}


def main() -> None:
    """Count all costs and write the file."""
    plain = adapted(None)
    measured = {
        "presets": {name: preset(name) for name in presets()},
        "example": {"network": EXAMPLE, "macs": plain.macs, "params": plain.params},
        "added": {name: added(name, plain) for name in registered("method")},
    }
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
