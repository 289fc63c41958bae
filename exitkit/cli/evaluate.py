"""`exitkit evaluate`: run a trained network over its validation and test images again."""

from __future__ import annotations

import click


@click.command(short_help="Evaluate a trained run again.")
@click.argument("run", metavar="RUN")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.  [default: where it was trained]")
def evaluate(run: str, device: str | None) -> None:
    """Evaluate a trained run again, and write its outputs, costs and results anew.

    \b
    Example:
      exitkit evaluate runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d
    """
    from exitkit.cli.show import print_run
    from exitkit.exit_outputs import evaluate as evaluate_run
    from exitkit.runs import RunFolder

    evaluate_run(run, device=device)
    print_run(RunFolder(run))
