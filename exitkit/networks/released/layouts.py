"""How the authors' released files name the tensors of each family of networks.

The layouts are those of the MSDNet, RANet and Shallow-Deep Networks code, which the code of IMTA, BoostNet, Meta-GF
and L2W-DEN shares. All numbers count from 0, as ours do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from exitkit.networks.cascade import MultiExitNetwork


@dataclass(frozen=True)
class Layout:
    """How a family's released files name its tensors.

    Args:
        rules: (regular expression, replacement) of what our name begins with; the first that matches counts.
        places: modules whose number in the file depends on the network: {our prefix: the file's}, replaced first.
    """

    rules: tuple[tuple[str, str], ...]
    places: Callable[[MultiExitNetwork], dict[str, str]] = lambda network: {}

    def names(self, network: MultiExitNetwork) -> dict[str, str]:
        """Return {our name: the file's} of every tensor of the network."""
        places = self.places(network)
        return {name: self._name(name, places) for name in network.state_dict()}

    def _name(self, name: str, places: Mapping[str, str]) -> str:
        for ours in _prefixes(name):
            if ours in places:
                name = places[ours] + name.removeprefix(ours)
                break
        name = begun_anew(name, self.rules)
        # A unit is one list there, of two convolutions with normalisation and ReLU each; ours are two lists of three.
        return re.sub(r"\.net\.(\d)\.(\d)\.", lambda unit: f".net.{3 * int(unit[1]) + int(unit[2])}.", name)


def begun_anew(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Return `name` with its beginning replaced by the first rule whose expression matches there."""
    for expression, replacement in rules:
        if match := re.match(expression, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _prefixes(name: str) -> list[str]:
    """Return `a.b.c`, `a.b`, `a` for `a.b.c`: what could be the module that a tensor belongs to."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


_HEADS = (
    (r"heads\.(\d+)\.embed\.(\d)\.", r"classifier.\1.m.\2.net."),
    (r"heads\.(\d+)\.classify\.", r"classifier.\1.linear."),
)


def _large_stem(ours: str, theirs: str) -> Callable[[MultiExitNetwork], dict[str, str]]:
    """The ImageNet stem's first layer, told by its bias, has no unit's `net` around it."""

    def places(network: MultiExitNetwork) -> dict[str, str]:
        return {ours: theirs} if f"{ours}.0.bias" in network.state_dict() else {}

    return places


def _ranet_places(network: MultiExitNetwork) -> dict[str, str]:
    """Blocks are numbered in their sub-network there, in their stage here."""
    places = _large_stem("stages.0.stem.features.0", "FirstLayer.layers.0")(network)
    flow, block = -1, 0
    for index, stage in enumerate(network.stages):
        if stage.starts:
            flow, block = flow + 1, 0
        for own in range(len(stage.blocks)):  # type: ignore[arg-type]
            places[f"stages.{index}.blocks.{own}"] = f"scale_flows.{flow}.{block}"
            block += 1
    return places


def _sdn(stem: bool, *rules: tuple[str, str]) -> Layout:
    """Return the layout of a trunk whose units are numbered through, with or without a stem before the first.

    An internal classifier belongs to its unit there; `rules` name what is inside a unit, and the last head.
    """

    def places(network: MultiExitNetwork) -> dict[str, str]:
        found: dict[str, str] = {}
        unit = -1 if stem else 0
        for index, stage in enumerate(network.stages):
            for own in range(len(list(stage.children()))):
                found[f"stages.{index}.{own}"] = "init_conv" if unit < 0 else f"layers.{unit}"
                unit += 1
            found[f"heads.{index}"] = "end_layers" if index == network.num_exits - 1 else f"layers.{unit - 1}.output"
        return found

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
"""The layout of each family whose releases are known (`MultiExitNetwork.family`)."""
