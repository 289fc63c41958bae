"""`python -m exitkit.benchmarks.speed.layouts`: training speed per precision and memory layout, over the plain loop."""

from __future__ import annotations

import click
import torch
import torch.nn.functional as F

from exitkit.benchmarks.speed.timing import Ratio, paired_ratios
from exitkit.benchmarks.speed.work import Step, Work
from exitkit.cli import main

NETWORKS = ("msdnet-cifar-lg5", "ranet-cifar-any", "sdn-resnet56", "sdn-vgg16")
FORMS = {
    "fp32": (False, torch.contiguous_format),
    "fp32, channels last": (False, torch.channels_last),
    "bf16": (True, torch.contiguous_format),
    "bf16, channels last": (True, torch.channels_last),
}
"""{name: (bf16 autocast, memory layout)}."""


def plain(work: Work, form: str = "fp32") -> Step:
    """Return a function that runs one step of joint training as released code writes it, without exitkit's loop.

    Args:
        work: network and batch.
        form: one of `FORMS`; the default is that of released code.
    """
    reduced, layout = FORMS[form]
    network, (images, labels) = work.build(), work.data()
    network.to(memory_format=layout)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        with torch.autocast(work.device, torch.bfloat16, enabled=reduced):
            loss = torch.stack([F.cross_entropy(logits, labels) for logits in network(images).logits]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def speedups(work: Work) -> dict[str, Ratio]:
    """Return, per form, the time of the plain fp32 step in steps of that form: its speed-up."""
    base = plain(work)
    return {form: paired_ratios(base, plain(work, form), work.rounds) for form in FORMS if form != "fp32"}


@click.command()
@click.option("--networks", default=",".join(NETWORKS), show_default=True, help="Backbones, separated by commas.")
@click.option("--batch", type=click.IntRange(min=2), default=64, show_default=True, help="Images per step.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Measured pairs per form.")
def layouts(networks: str, batch: int, rounds: int) -> None:
    """Print the speed-up of each precision and memory layout over a plain fp32 training step."""
    torch.set_num_threads(1)
    click.echo("| network | " + " | ".join(form for form in FORMS if form != "fp32") + " |")
    click.echo("|---|" + "--:|" * (len(FORMS) - 1))
    for name in networks.split(","):
        ratios = speedups(Work(name, batch, rounds=rounds)).values()
        cells = (f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in ratios)
        click.echo(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(command=layouts)
