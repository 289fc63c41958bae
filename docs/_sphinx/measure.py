"""Counts what the tables of the site need and a build has no time for: `python docs/_sphinx/measure.py`.

Writes measured.json beside itself: what every preset's exits cost, and what each method adds to a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from exitkit import build_network, build_strategy, cost
from exitkit.networks.costs import ExitCost
from exitkit.networks.families.base import home
from exitkit.plugins import load, registered

MEASURED = Path(__file__).with_name("measured.json")
EXAMPLE = "msdnet-cifar-lg5"
"""The network that facts about methods are told of."""


def preset(name: str) -> dict[str, Any]:
    """Return a preset's images, classes, and the costs of its first and last exit."""
    shape, classes = home(load("backbone", name))
    with torch.device("meta"):
        costs = cost(build_network(name))
    ends = {key: [getattr(costs[place], key) for place in (0, -1)] for key in ("macs", "papers", "params")}
    return {"images": list(shape), "classes": classes, "exits": len(costs), **ends}


def adapted(method: str | None) -> ExitCost:
    """Return the cost of the last exit of the example, with all that a method puts into the network."""
    with torch.device("meta"):
        network = build_network(EXAMPLE)
        for phase in build_strategy(method).phases(10, network.num_exits) if method else ():
            phase.strategy.adapt(network)
    return cost(network)[-1]


def added(method: str, plain: ExitCost) -> dict[str, int]:
    """Return how many multiply-adds and parameters a method adds."""
    ours = adapted(method)
    return {"macs": ours.macs - plain.macs, "params": ours.params - plain.params}


def main() -> None:
    """Count, and write."""
    presets = [name for name in registered("backbone") if name != "torchvision"]
    plain = adapted(None)
    measured = {
        "presets": {name: preset(name) for name in presets},
        "example": {"network": EXAMPLE, "macs": plain.macs, "params": plain.params},
        "added": {name: added(name, plain) for name in registered("method")},
    }
    MEASURED.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
