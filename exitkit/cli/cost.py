"""`exitkit cost`: multiply-adds and parameters of every exit."""

from __future__ import annotations

import json

import click

from exitkit.cli.completion import names
from exitkit.cli.options import json_option, parse_sets
from exitkit.errors import UserError


@click.command(short_help="Print multiply-adds and parameters of every exit.")
@click.option(
    "--backbone",
    metavar="NAME",
    default="msdnet-tiny",
    show_default=True,
    shell_complete=names("backbones"),
    help="Network or preset.",
)
@click.option(
    "--method",
    metavar="NAME",
    shell_complete=names("methods"),
    help="Also count the layers that this method adds.",
)
@click.option("--num-classes", type=int, help="Number of classes.  [default: the preset's]")
@click.option("--input-shape", metavar="C,H,W", help="Shape of an image.  [default: the preset's]")
@click.option("--set", "sets", metavar="FIELD=VALUE", multiple=True, help="Set a field of the backbone; repeatable.")
@json_option("the counts of each exit")
def cost(
    backbone: str,
    method: str | None,
    num_classes: int | None,
    input_shape: str | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print multiply-adds and parameters of every exit, counted by running the network stage by stage.

    Multiply-adds (`macs` in JSON) are those of convolutions and linear layers. The papers' count (`papers`) includes
    biases of linear layers, ReLU and pooling, as in the papers' tables. Pruned (`pruned`) is the number of
    multiply-adds of the network cut at that exit, without earlier heads and without layers that only later exits use.
    All counts are for one image, up to and including the exit.

    \b
    Examples:
      exitkit cost --backbone msdnet-tiny
      exitkit cost --backbone msdnet --set blocks=5 --set growth=8 --json
    """
    from exitkit.networks.build import build_backbone, make_backbone
    from exitkit.networks.costs import cost as count
    from exitkit.runs.job import adapt
    from exitkit.strategy.composition import build_strategy

    made = make_backbone(backbone, parse_sets(sets))
    network = build_backbone(made, backbone, num_classes, _shape(input_shape))
    if method:
        adapt(network, build_strategy(method))
    rows = [row._asdict() for row in count(network)]
    if as_json:
        facts = {"backbone": backbone, "num_classes": network.num_classes, "input_shape": network.input_shape}
        click.echo(json.dumps(facts | {"exits": rows}, indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    from exitkit.cli.terminal import Console

    channels, height, width = network.input_shape
    table = Table(title=f"{escape(backbone)}: {network.num_classes} classes, input {channels}×{height}×{width}")
    for heading in ("exit", "multiply-adds", "papers' count", "pruned", "parameters"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(str(row["exit"]), *(f"{row[key]:,}" for key in ("macs", "papers", "pruned", "params")))
    Console().print(table)


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and len(part) < 19 and int(part) > 0 for part in parts):
        raise UserError(
            f"--input-shape {text!r:.80} is not an image shape; expected channels,height,width, such as 3,32,32"
        )
    channels, height, width = (int(part) for part in parts)
    return channels, height, width
