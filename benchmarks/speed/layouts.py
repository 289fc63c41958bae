"""`python -m exitkit.benchmarks.speed.layouts`: joint training per precision and layout, over the plain loop."""

from __future__ import annotations

import click
import torch

from exitkit.benchmarks.speed.plain import LOOPS
from exitkit.benchmarks.speed.timing import Ratio, paired_ratios
from exitkit.benchmarks.speed.training import Form
from exitkit.benchmarks.speed.work import Work
from exitkit.cli import main

NETWORKS = ("msdnet-cifar-lg5", "ranet-cifar-any", "sdn-resnet56", "sdn-vgg16")
FORMS: dict[str, Form] = {
    "fp32, contiguous": {"precision": "fp32", "layout": "contiguous"},
    "fp32, channels-last": {"precision": "fp32", "layout": "channels-last"},
    "bf16, contiguous": {"precision": "bf16", "layout": "contiguous"},
    "bf16, channels-last": {"precision": "bf16", "layout": "channels-last"},
}


def speedups(work: Work) -> dict[str, Ratio]:
    """Return, per form, the speed of exitkit's joint step in that of the plain loop."""
    plain = LOOPS["joint"](work)
    return {form: paired_ratios(plain, work.step("joint", **values), work.rounds) for form, values in FORMS.items()}


@click.command()
@click.option("--networks", default=",".join(NETWORKS), show_default=True, help="Backbones, separated by commas.")
@click.option("--batch", type=click.IntRange(min=2), default=64, show_default=True, help="Images per step.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Measured pairs per form.")
def layouts(networks: str, batch: int, rounds: int) -> None:
    """Print the speed of joint training in each precision and memory layout, in that of the plain loop in fp32."""
    torch.set_num_threads(1)
    click.echo("| network | " + " | ".join(FORMS) + " |")
    click.echo("|---|" + "--:|" * len(FORMS))
    for name in networks.split(","):
        ratios = speedups(Work(name, batch, rounds=rounds)).values()
        cells = (f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in ratios)
        click.echo(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(command=layouts)
