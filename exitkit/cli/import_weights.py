"""`exitkit import-weights`: the authors' released weights, in our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import names
from exitkit.cli.options import parse_sets
from exitkit.errors import UserError

if TYPE_CHECKING:
    from exitkit.networks.cascade import MultiExitNetwork
    from exitkit.strategy.base import TrainingStrategy


@click.command(short_help="Bring the authors' released weights onto a network of ours.")
@click.argument("file", metavar="FILE")
@click.option(
    "--backbone",
    metavar="NAME",
    required=True,
    shell_complete=names("backbones"),
    help="Network or preset that the file is of.",
)
@click.option(
    "--method",
    metavar="NAME",
    shell_complete=names("methods"),
    help="Method whose own tensors the file holds, too.",
)
@click.option("--num-classes", type=int, help="Classes.  [default: the file's]")
@click.option("--set", "sets", metavar="FIELD=VALUE", multiple=True, help="Any field of the backbone; repeatable.")
@click.option("--out", metavar="FILE", help="What to write.  [default: FILE's name.safetensors, here]")
def import_weights(
    file: str, backbone: str, method: str | None, num_classes: int | None, sets: tuple[str, ...], out: str | None
) -> None:
    """Bring a released checkpoint's tensors onto a network of ours, and write them under our names.

    Reads pickled checkpoints (tensors and plain values alone: nothing in the file is run) and safetensors. Every
    tensor of the network has to be found, in its shape; what else the file holds is left out, and said.

    \b
    Examples:
      exitkit import-weights model_best.pth.tar --backbone msdnet-cifar-k7
      exitkit import-weights ranet.pth --backbone ranet-imagenet-64 --out ranet.st
    """
    from exitkit.files import exists, save_tensors
    from exitkit.networks.released.weights import load_released_weights, read_released_file
    from exitkit.strategy.composition import build_strategy

    source = Path(file)
    target = Path(out) if out else Path(re.sub(r"(\.(pth|pt|tar|safetensors))+$", "", source.name) + ".safetensors")
    if exists(target):
        raise UserError(f"{target} is there already; name another file by --out")
    strategy = build_strategy(method) if method else None
    settings = parse_sets(sets)
    content = read_released_file(source)
    classes = _classes(content, backbone, settings, strategy, num_classes)
    network = _network(backbone, settings, strategy, classes)
    fit = load_released_weights(network, content, strategy)
    save_tensors(target, network.state_dict())
    click.echo(f"loaded {fit.loaded} tensors into {backbone} ({network.num_classes} classes), written to {target}")
    if fit.unused:
        more = f" and {len(fit.unused) - 5} more" if len(fit.unused) > 5 else ""
        click.echo(f"left out {len(fit.unused)} tensors of {source.name}: {', '.join(fit.unused[:5])}{more}")


def _network(
    backbone: str, settings: Mapping[str, Any], strategy: TrainingStrategy | None, classes: int | None
) -> MultiExitNetwork:
    """Build the network, with what every phase of the method puts into it."""
    from exitkit.networks.build import build_network
    from exitkit.runs.job import adapt

    network = build_network(backbone, num_classes=classes, **settings)
    if strategy:
        adapt(network, strategy)
    return network


def _classes(
    content: Mapping[str, Any],
    backbone: str,
    settings: Mapping[str, Any],
    strategy: TrainingStrategy | None,
    given: int | None,
) -> int | None:
    """Return the number of classes of the file.

    Raises:
        UserError: the command line says another.
    """
    import torch

    from exitkit.networks.released.weights import released_classes

    with torch.device("meta"):
        outline = _network(backbone, settings, strategy, given)
    found = released_classes(outline, content, strategy)
    if given is not None and found is not None and found != given:
        raise UserError(f"the file is of {found} classes, --num-classes says {given}; leave --num-classes out")
    return found
