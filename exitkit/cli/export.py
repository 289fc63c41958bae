"""`exitkit export`: writes a run as programs that do not need exitkit, with its exit policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import click

from exitkit.cli.completion import folders, one_of, runs
from exitkit.cli.options import data_dir_option, json_option, policy_option, target_options
from exitkit.errors import UserError
from exitkit.escaping import counted

if TYPE_CHECKING:
    from exitkit.data.base import Data
    from exitkit.inference.export.programs import Format
    from exitkit.runs.folder import RunFolder

_CHECKED = 64
"""Number of test images on which an export is checked."""
_COMPARED = 2000
"""Largest number of test images on which int8 is compared with fp32."""


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
    "--out",
    metavar="DIR",
    shell_complete=folders,
    help="Folder to write.  [default: RUN-FORMAT, or RUN-int8, in this folder]",
)
@click.option(
    "--budget",
    metavar="AMOUNT",
    help="Average cost: 40M (multiply-adds), 60% (of the last exit's) or 1.5ms (measured).",
)
@target_options
@click.option(
    "--score",
    metavar="NAME",
    shell_complete=one_of("confidence", "margin", "entropy", "patience"),
    help="Exit score: confidence, margin, entropy or patience.  [default: confidence]",
)
@policy_option
@click.option("--calibrated", is_flag=True, help="Scale logits by a temperature per exit, fitted on validation images.")
@click.option("--int8", is_flag=True, help="Quantise to int8 (onnx only), with thresholds of its own.")
@data_dir_option
@json_option("the content of policy.json")
def export(
    run: str,
    form: str,
    out: str | None,
    budget: str | None,
    score: str | None,
    policy: str | None,
    calibrated: bool,
    int8: bool,
    data_dir: str | None,
    as_json: bool,
    **target: Any,
) -> None:
    """Export a finished run for deployment: one program per stage and head, the exit policy and a runner.

    The folder contains stage-1, stage-2, ... (dynamic batch size), all-exits (the whole network as one program),
    policy.json and run.py, which predicts classes and skips all later stages for images that have exited. Thresholds
    are chosen on the run's validation outputs for --budget, --latency, --lose or --accuracy; without one of them, they
    are those of the lowest-cost operating point without loss of validation accuracy. --policy exports another policy,
    by its name in `exitkit policies`. The programs are checked against the network on the run's test images.

    --int8 quantises the programs by onnxruntime, calibrated on validation images, chooses the thresholds anew on the
    quantised outputs, and prints accuracy, cost and time of fp32 and int8 on test images.

    \b
    Examples:
      exitkit export runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d --budget 100K
      exitkit export RUN --format torch-export --out deployed
      exitkit export RUN --policy mie+stopping --budget 60%
      exitkit export RUN --lose 1 --certainty 0.95
      exitkit export RUN --int8 --out deployed
    """
    from exitkit.files import exists
    from exitkit.inference.export.programs import ENDINGS
    from exitkit.runs.folder import RunFolder

    folder = RunFolder(run)
    if form not in ENDINGS:
        raise UserError(f"--format is {form!r}; expected {' or '.join(ENDINGS)}")
    if int8 and form != "onnx":
        raise UserError(f"--int8 quantises ONNX programs; expected --format onnx, not {form}")
    if policy and (score or calibrated):
        raise UserError(f"--policy {policy} names the score itself; expected no --score and no --calibrated beside it")
    wishes = {"policy": policy, "score": score, "calibrated": calibrated, "budget": budget, **target}
    folder_out = Path(out) if out else Path(f"{folder.path.name}-{'int8' if int8 else form}")
    if exists(folder_out):
        raise UserError(f"{folder_out} exists already; give another folder by --out")
    written, told = _write(folder, folder_out, wishes, form, int8, data_dir)
    if as_json:
        click.echo(json.dumps(written, indent=2))
        return
    told()
    programs = counted(len(written["programs"]), "program")
    click.echo(f"wrote {programs}, all-exits, policy.json, run.py and serve.py to {folder_out}")
    click.echo(f"check it: python {folder_out / 'run.py'} --check")
    click.echo(f"serve it: python {folder_out / 'run.py'} --serve 8000")


def _write(
    run: RunFolder, out: Path, wishes: dict[str, Any], form: str, int8: bool, data_dir: str | None
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Write the export; return the content of policy.json, and the function that prints what is expected of it."""
    from exitkit.cli.progress import loading, working

    with loading("torch"):
        import torch
    from exitkit.inference.choose import outcome, outcome_table
    from exitkit.inference.export.bundle import about, of_programs, operating_points
    from exitkit.inference.export.export import export as write
    from exitkit.inference.policy import read_policy
    from exitkit.inference.targets import Target
    from exitkit.runs.job import load_network, load_run_data

    if int8 and wishes["policy"] and read_policy(wishes["policy"]).reads_embeddings:
        raise UserError(f"--policy {wishes['policy']} reads embeddings, which int8 does not keep; expected no --int8")
    wanted = Target.of(**{key: value for key, value in wishes.items() if key not in ("policy", "score", "calibrated")})
    if int8 and wanted and wanted.unit == "latency":
        raise UserError(f"{wanted.text} is in milliseconds of fp32; expected multiply-adds or a share with --int8")
    with working(f"fitting {wishes['policy']}" if wishes["policy"] else "choosing thresholds"):
        chosen = _rule(run, **wishes)
        rule = chosen.policy if wishes["policy"] else chosen
        costs = [row["macs"] for row in run.costs()]
        decides, name, (validation, test) = of_programs(run, rule, wishes["policy"])
        points = operating_points(decides, validation, test, costs, **wishes | {"policy": name})
    expected = outcome(run, chosen, wanted.unit if wanted else "macs")
    torch.set_num_threads(run.recipe.threads)
    data = load_run_data(run, data_dir)
    network = load_network(run, data)
    images = _Images(data, "test", len(data.labels("test")))[:_CHECKED]
    facts = about(run, data) | {"target": wanted.words if wanted else None, "expected": expected, "points": points}
    with working("exporting"), TemporaryDirectory() as scratch:
        first = Path(scratch, "fp32") if int8 else out
        written = write(network, rule, first, torch.from_numpy(images), facts, cast("Format", form))
        if int8:
            written, comparison = _quantised(run, data, first, out, wishes, facts)
            return written, lambda: _print_comparison(comparison)
    target = wanted.words if wanted else "no loss of accuracy on validation"
    return written, lambda: click.echo(outcome_table(expected, target))


def _rule(
    run: RunFolder, *, policy: str | None, score: str | None, calibrated: bool, budget: str | None, **target: Any
) -> Any:
    """Return the `ExitRule` or `ChosenPolicy` that the options ask for, on the run's validation outputs."""
    from exitkit.inference.choose import policies_of_run, rule_of_run
    from exitkit.inference.targets import Target

    if policy:
        return policies_of_run(run, policy, [Target.of(budget=budget, **target)])[0]
    return rule_of_run(run, budget=budget, score=score or "confidence", calibrated=calibrated, **target)


def _rule_of_outputs(
    logits: Any,
    labels: Any,
    costs: list[int],
    *,
    policy: str | None,
    score: str | None,
    calibrated: bool,
    budget: str | None,
    **target: Any,
) -> Any:
    """Return the rule or policy that the options ask for, on other outputs for the validation images."""
    from exitkit.inference.choose import policy_of_outputs, rule_of_outputs

    if policy:
        return policy_of_outputs(policy, logits, labels, costs, budget=budget, **target)
    name = score or "confidence"
    return rule_of_outputs(logits, labels, costs, budget=budget, score=name, calibrated=calibrated, **target)


def _quantised(
    run: RunFolder, data: Data, source: Path, out: Path, wishes: dict[str, Any], facts: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the int8 export; return its policy, and its comparison with fp32 on test images."""
    from exitkit.inference.export.bundle import operating_points
    from exitkit.inference.export.int8 import compare, quantise

    parts: dict[str, Any] = {"validation": data.labels("validation").numpy()}
    parts["test"] = data.labels("test")[:_COMPARED].numpy()
    images = {part: _Images(data, part, len(labels)) for part, labels in parts.items()}
    costs = [row["macs"] for row in run.costs()]

    def choose(logits: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        import torch

        outputs = {part: {"logits": logits[part], "labels": labels} for part, labels in parts.items()}
        fitting = torch.from_numpy(logits["validation"]), torch.from_numpy(parts["validation"])
        rule = _rule_of_outputs(*fitting, costs, **wishes)
        points = operating_points(rule, outputs["validation"], outputs["test"], costs, **wishes)
        return rule, {**facts, "expected": None, "points": points}

    written = quantise(source, out, images, choose)
    return written, compare({"fp32": source, "int8": out}, images["test"][:], parts["test"], costs)


class _Images:
    """The first images of a part, read when they are sliced: float32 [n, C, H, W]."""

    def __init__(self, data: Data, part: Any, count: int) -> None:
        self._data, self._part, self._count = data, part, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> Any:
        import torch

        chosen = torch.arange(self._count)[rows]
        (batch,) = self._data.batches(self._part, [chosen], augment=False, seed=0)
        return batch.images.float().numpy()


def _print_comparison(found: dict[str, Any]) -> None:
    """Print accuracy, cost and time of fp32 and int8, side by side."""
    from rich.table import Table

    from exitkit.cli.terminal import Console

    table = Table()
    for name in ("on test images", *found):
        table.add_column(name, justify="left" if name == "on test images" else "right")
    for number in range(len(found["fp32"]["exits"])):
        table.add_row(f"exit {number + 1}: accuracy", *(f"{each['exits'][number]:.2f} %" for each in found.values()))
    table.add_row("early exit: accuracy", *(f"{each['accuracy']:.2f} %" for each in found.values()))
    table.add_row("multiply-adds per image", *(f"{each['cost']:,.0f}" for each in found.values()))
    table.add_row("milliseconds per image", *(f"{each['milliseconds']:.3g}" for each in found.values()))
    Console(highlight=False).print(table)
