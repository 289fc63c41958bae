"""Names of the tensors in the authors' released files, per family of networks.

The layouts are those of the published code of MSDNet, RANet and Shallow-Deep Networks, which the code of IMTA,
BoostNet, Meta-GF and L2W-DEN shares. Indices start at 0, in the files as in exitkit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from exitkit.networks.cascade import MultiExitNetwork


@dataclass(frozen=True)
class Layout:
    """Mapping from exitkit's tensor names to those in the released files of a family.

    Args:
        rules: (regular expression, replacement) pairs for the beginning of exitkit's name; the first match is used.
        places: function that returns {exitkit's prefix: the file's prefix} of the modules whose index in the file
            depends on the network; these prefixes are replaced before `rules` apply.
    """

    rules: tuple[tuple[str, str], ...]
    places: Callable[[MultiExitNetwork], dict[str, str]] = lambda network: {}

    def names(self, network: MultiExitNetwork) -> dict[str, str]:
        """Return {exitkit's name: the file's name} for every tensor of the network."""
        places = self.places(network)
        return {name: self._name(name, places) for name in network.state_dict()}

    def _name(self, name: str, places: Mapping[str, str]) -> str:
        for prefix in _prefixes(name):
            if prefix in places:
                name = places[prefix] + name.removeprefix(prefix)
                break
        name = replace_prefix(name, self.rules)
        # In the files a unit is one list (convolution, normalisation, ReLU, twice); here it is two lists of three.
        return re.sub(r"\.net\.(\d)\.(\d)\.", lambda unit: f".net.{3 * int(unit[1]) + int(unit[2])}.", name)


def replace_prefix(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Return `name` with its beginning replaced by the first rule whose expression matches it."""
    for expression, replacement in rules:
        if match := re.match(expression, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _prefixes(name: str) -> list[str]:
    """Return `a.b.c`, `a.b`, `a` for `a.b.c`: the possible names of the module that contains a tensor."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


_HEADS = (
    (r"heads\.(\d+)\.embed\.(\d)\.", r"classifier.\1.m.\2.net."),
    (r"heads\.(\d+)\.classify\.", r"classifier.\1.linear."),
)


def _large_stem(prefix: str, file_prefix: str) -> Callable[[MultiExitNetwork], dict[str, str]]:
    """Return the place of the ImageNet stem's first layer, which has a bias and, in the files, no `net` around it."""

    def places(network: MultiExitNetwork) -> dict[str, str]:
        return {prefix: file_prefix} if f"{prefix}.0.bias" in network.state_dict() else {}

    return places


def _ranet_places(network: MultiExitNetwork) -> dict[str, str]:
    """Return the places of RANet's blocks: the files number them per sub-network, exitkit per stage."""
    places = _large_stem("stages.0.stem.features.0", "FirstLayer.layers.0")(network)
    flow, block = -1, 0
    for index, stage in enumerate(network.stages):
        if stage.starts:
            flow, block = flow + 1, 0
        for position in range(len(stage.blocks)):  # type: ignore[arg-type]
            places[f"stages.{index}.blocks.{position}"] = f"scale_flows.{flow}.{block}"
            block += 1
    return places


def _sdn(stem: bool, *rules: tuple[str, str]) -> Layout:
    """Return the layout of a trunk whose units are numbered consecutively, with or without a stem before the first.

    In the files an internal classifier is part of its unit; `rules` map the modules inside a unit, and the last head.
    """

    def places(network: MultiExitNetwork) -> dict[str, str]:
        prefixes: dict[str, str] = {}
        unit = -1 if stem else 0
        for index, stage in enumerate(network.stages):
            for position in range(len(list(stage.children()))):
                prefixes[f"stages.{index}.{position}"] = "init_conv" if unit < 0 else f"layers.{unit}"
                unit += 1
            prefixes[f"heads.{index}"] = "end_layers" if index == network.num_exits - 1 else f"layers.{unit - 1}.output"
        return prefixes

    classifier = ((r"(.+\.output)\.embed\.\d+\.alpha", r"\1.alpha"), (r"(.+\.output)\.classify\.", r"\1.linear."))
    return Layout((*classifier, *rules), places)


LAYOUTS: dict[str, Layout] = {
    "msdnet": Layout(
        (
            (r"stages\.0\.0\.scales\.(\d+)\.", r"blocks.0.0.layers.\1.net."),
            (r"stages\.(\d+)\.(\d+)\.scales\.(\d+)\.", r"blocks.\1.\2.m.\3.net."),
            (r"stages\.(\d+)\.(\d+)\.same\.(\d+)\.", r"blocks.\1.\2.layers.\3.conv_normal.net."),
            (r"stages\.(\d+)\.(\d+)\.down\.(\d+)\.", r"blocks.\1.\2.layers.\3.conv_down.net."),
            *_HEADS,
        ),
        _large_stem("stages.0.0.scales.0", "blocks.0.0.layers.0"),
    ),
    "ranet": Layout(
        (
            (r"stages\.0\.stem\.features\.(\d+)\.", r"FirstLayer.layers.\1.net."),
            (r"(scale_flows\.\d+\.\d+)\.new\.(\d+)\.", r"\1.layers.\2.conv_normal.net."),
            (r"(scale_flows\.\d+\.\d+)\.up\.(\d+)\.", r"\1.layers.\2.conv_up.net."),
            (r"(scale_flows\.\d+\.\d+)\.last\.", r"\1.conv_last.net."),
            (r"(scale_flows\.\d+\.\d+)\.transition\.", r"\1.trans.net."),
            *_HEADS,
        ),
        _ranet_places,
    ),
    "sdn-vgg": _sdn(
        False,
        (r"(layers\.\d+)\.", r"\1.layers."),
        (r"end_layers\.embed\.", "end_layers."),
        (r"end_layers\.classify\.", "end_layers.2."),
    ),
    "sdn-resnet": _sdn(
        True,
        (r"init_conv\.paths\.0\.", "init_conv."),
        (r"(layers\.\d+)\.paths\.", r"\1.layers."),
        (r"end_layers\.classify\.", "end_layers.2."),
    ),
    "sdn-wrn": _sdn(
        True,
        (r"(layers\.\d+)\.path\.", r"\1.layers.0."),
        (r"(layers\.\d+)\.shortcut\.", r"\1.layers.1.0."),
        (r"end_layers\.embed\.", "end_layers."),
        (r"end_layers\.classify\.", "end_layers.4."),
    ),
    "sdn-mobilenet": _sdn(
        True,
        (r"(layers\.\d+)\.", r"\1.layers."),
        (r"end_layers\.classify\.", "end_layers.2."),
    ),
}
"""Layouts by `MultiExitNetwork.family`, for the families with released weights."""
