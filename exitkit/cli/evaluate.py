"""`exitkit evaluate`: evaluates a trained network on its validation and test images again."""

from __future__ import annotations

import json

import click

from exitkit.cli.completion import runs
from exitkit.cli.options import data_dir_option, device_option, json_option


@click.command(short_help="Evaluate a trained run again.")
@click.argument("run", metavar="RUN", shell_complete=runs)
@device_option("[default: the device of training]")
@data_dir_option
@json_option("the same as `exitkit show --json`")
def evaluate(run: str, device: str | None, data_dir: str | None, as_json: bool) -> None:
    """Evaluate a trained run again, and replace its outputs, costs and results.

    \b
    Examples:
      exitkit evaluate runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d
      exitkit evaluate RUN --device cuda --json
    """
    from exitkit.cli.progress import loading, working
    from exitkit.cli.show import facts, print_run

    with loading("torch"):
        import torch  # noqa: F401
    from exitkit.runs.evaluate import evaluate as evaluate_run
    from exitkit.runs.folder import RunFolder

    with working("evaluating") as report:
        evaluate_run(run, device=device, data_dir=data_dir, tell=report)
    if as_json:
        click.echo(json.dumps(facts(RunFolder(run)), indent=2))
    else:
        print_run(RunFolder(run))
