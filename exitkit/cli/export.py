"""`exitkit export`: writes a run as programs that do not need exitkit, with its exit policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from exitkit.cli.completion import folders, one_of, runs
from exitkit.cli.options import data_dir_option, json_option
from exitkit.errors import UserError

if TYPE_CHECKING:
    from exitkit.data.base import Data
    from exitkit.inference.export.export import Format
    from exitkit.runs.folder import RunFolder

_CHECKED = 64
"""Number of test images on which an export is checked."""


@click.command(short_help="Export a run for deployment, with its exit policy.")
@click.argument("run", metavar="RUN", shell_complete=runs)
@click.option(
    "--format",
    "form",
    default="onnx",
    show_default=True,
    shell_complete=one_of("onnx", "torch-export"),
    metavar="NAME",
    help="onnx or torch-export.",
)
@click.option(
    "--out", metavar="DIR", shell_complete=folders, help="Folder to write.  [default: RUN-FORMAT in this folder]"
)
@click.option("--budget", metavar="AMOUNT", help="Average cost per image: 40M (multiply-adds) or 1.5ms (measured).")
@click.option(
    "--score",
    default="confidence",
    show_default=True,
    metavar="NAME",
    shell_complete=one_of("confidence", "margin", "entropy", "patience"),
    help="Exit score: confidence, margin, entropy or patience.",
)
@click.option("--calibrated", is_flag=True, help="Scale logits by a temperature per exit, fitted on validation images.")
@data_dir_option
@json_option("the content of policy.json")
def export(
    run: str,
    form: str,
    out: str | None,
    budget: str | None,
    score: str,
    calibrated: bool,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Export a finished run for deployment: one program per stage and head, the exit policy and a runner.

    The folder contains stage-1, stage-2, ... (dynamic batch size), all-exits (the whole network as one program),
    policy.json and run.py, which predicts classes and skips all later stages for images that have exited. Thresholds
    are chosen on the run's validation outputs; without --budget, they are those of the lowest-cost operating point
    without loss of validation accuracy. The programs are checked against the network on the run's test images.

    \b
    Examples:
      exitkit export runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d --budget 100K
      exitkit export RUN --format torch-export --out deployed
    """
    from exitkit.cli.progress import loading, working

    with loading("torch"):
        import torch
    from exitkit.inference.choose import rule_of_run
    from exitkit.inference.export.export import ENDINGS
    from exitkit.inference.export.export import export as write
    from exitkit.runs.folder import RunFolder
    from exitkit.runs.job import load_network, load_run_data

    folder = RunFolder(run)
    if form not in ENDINGS:
        raise UserError(f"--format is {form!r}; expected {' or '.join(ENDINGS)}")
    rule = rule_of_run(folder, budget=budget, score=score, calibrated=calibrated)
    target = Path(out) if out else Path(f"{folder.path.name}-{form}")
    torch.set_num_threads(folder.recipe.threads)
    data = load_run_data(folder, data_dir)
    network = load_network(folder, data)
    count = min(_CHECKED, len(data.labels("test")))
    (batch,) = data.batches("test", [torch.arange(count)], augment=False, seed=0)
    with working("exporting"):
        policy = write(network, rule, target, batch.images, _about(folder, data), cast("Format", form))
    if as_json:
        click.echo(json.dumps(policy, indent=2))
        return
    click.echo(f"wrote {len(policy['programs'])} programs, all-exits, policy.json and run.py to {target}")
    click.echo(f"checked against the network on {count} test images; try: python {target / 'run.py'} IMAGES.npy")


def _about(run: RunFolder, data: Data) -> dict[str, Any]:
    """Return the mean, standard deviation, run name, class names and costs for policy.json."""
    from exitkit.data.image_files import MEAN, STD

    mean, std = getattr(data, "mean", MEAN), getattr(data, "std", STD)
    names = {"run": run.path.name, "class_names": list(data.class_names), "costs": run.costs()}
    return {"mean": list(mean), "std": list(std)} | names
