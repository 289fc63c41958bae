"""`exitkit import-weights`: converts weights released by a paper's authors to exitkit's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import names
from exitkit.cli.options import parse_sets
from exitkit.errors import UserError
from exitkit.escaping import counted

if TYPE_CHECKING:
    from exitkit.networks.cascade import MultiExitNetwork
    from exitkit.strategy.base import TrainingStrategy


@click.command(short_help="Convert weights that a paper's authors released.")
@click.argument("file", metavar="FILE")
@click.option(
    "--backbone",
    metavar="NAME",
    required=True,
    shell_complete=names("backbones"),
    help="Network or preset of the file.",
)
@click.option(
    "--method",
    metavar="NAME",
    shell_complete=names("methods"),
    help="Method whose additional tensors the file contains.",
)
@click.option("--num-classes", type=int, help="Number of classes.  [default: the file's]")
@click.option("--set", "sets", metavar="FIELD=VALUE", multiple=True, help="Set a field of the backbone; repeatable.")
@click.option("--out", metavar="FILE", help="New file to write.  [default: FILE as .safetensors in this folder]")
def import_weights(
    file: str, backbone: str, method: str | None, num_classes: int | None, sets: tuple[str, ...], out: str | None
) -> None:
    """Load the tensors of a released checkpoint into a network of exitkit, and write them under exitkit's names.

    FILE is a pickled checkpoint (only tensors and plain values are read, no code is executed) or a safetensors file,
    with the names that the authors gave, or exitkit's own. It must contain every tensor of the network, with the same
    shape; other tensors are left out and listed.

    \b
    Examples:
      exitkit import-weights model_best.pth.tar --backbone msdnet-cifar-k7
      exitkit import-weights ranet.pth --backbone ranet-imagenet-64 --out ranet.st
    """
    from exitkit.files import exists, save_tensors
    from exitkit.networks.released.weights import check_finite, load_released_weights, read_released_file
    from exitkit.strategy.composition import build_strategy

    source = Path(file)
    target = Path(out) if out else Path(re.sub(r"(\.(pth|pt|tar|safetensors))+$", "", source.name) + ".safetensors")
    if exists(target):
        raise UserError(f"{target} exists already; choose another file with --out")
    strategy = build_strategy(method) if method else None
    settings = parse_sets(sets)
    content = read_released_file(source)
    classes = _classes(content, backbone, settings, strategy, num_classes)
    network = _network(backbone, settings, strategy, classes)
    fit = load_released_weights(network, content, strategy)
    check_finite(network, file)
    save_tensors(target, network.state_dict())
    click.echo(
        f"loaded {counted(fit.loaded, 'tensor')} into {backbone} ({network.num_classes} classes), written to {target}"
    )
    if fit.unused:
        more = f" and {len(fit.unused) - 5} more" if len(fit.unused) > 5 else ""
        click.echo(f"left out {counted(len(fit.unused), 'tensor')} of {source.name}: {', '.join(fit.unused[:5])}{more}")


def _network(
    backbone: str, settings: Mapping[str, Any], strategy: TrainingStrategy | None, classes: int | None
) -> MultiExitNetwork:
    """Build the network, with the layers that the phases of the method add."""
    from exitkit.networks.build import build_backbone, make_backbone
    from exitkit.runs.job import adapt

    network = build_backbone(make_backbone(backbone, settings), backbone, classes, None)
    if strategy:
        adapt(network, strategy)
    return network


def _classes(
    content: Mapping[str, Any],
    backbone: str,
    settings: Mapping[str, Any],
    strategy: TrainingStrategy | None,
    requested: int | None,
) -> int | None:
    """Return the number of classes of the file.

    Raises:
        UserError: the number differs from the requested one.
    """
    import torch

    from exitkit.networks.released.weights import released_classes

    with torch.device("meta"):
        outline = _network(backbone, settings, strategy, requested)
    released = released_classes(outline, content, strategy)
    if requested is not None and released is not None and released != requested:
        raise UserError(f"the file has {released} classes, but --num-classes is {requested}; omit --num-classes")
    return released
