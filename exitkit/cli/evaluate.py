"""`exitkit evaluate`: evaluates a trained network on its validation and test images again."""

from __future__ import annotations

import json

import click

from exitkit.cli.completion import runs
from exitkit.cli.options import classes_option, data_dir_option, device_option, json_option


@click.command(short_help="Evaluate a trained run again.")
@click.argument("run", metavar="RUN", shell_complete=runs)
@device_option("[default: the device of training]")
@data_dir_option
@click.option("--embeddings", is_flag=True, help="Also store what last-layer Laplace needs.")
@classes_option
@json_option("the same as `exitkit show --json`")
def evaluate(
    run: str, device: str | None, data_dir: str | None, embeddings: bool, classes: bool, as_json: bool
) -> None:
    """Evaluate a trained run again, and replace its outputs, costs and results.

    Validation and test images that are missing or damaged by now are left out, and named.

    --embeddings also stores the embeddings of the exits for these images, and the curvature of the exits' last layers
    on the training images, from which `exitkit policies` fits the combinations laplace and mie-laplace.

    \b
    Examples:
      exitkit evaluate runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d
      exitkit evaluate RUN --device cuda --json
      exitkit evaluate RUN --embeddings
    """
    from exitkit.cli.progress import loading, working
    from exitkit.cli.show import facts, print_run

    with loading("torch"):
        import torch  # noqa: F401
    from exitkit.runs.evaluate import evaluate as evaluate_run
    from exitkit.runs.folder import RunFolder

    with working("evaluating") as report:
        evaluate_run(run, device=device, data_dir=data_dir, embeddings=embeddings, tell=report)
    if as_json:
        click.echo(json.dumps(facts(RunFolder(run), classes), indent=2))
    else:
        print_run(RunFolder(run), classes=classes)
