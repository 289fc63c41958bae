"""`exitkit diagnose`: how the exits of a run affect each other, as figures and tables."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import runs
from exitkit.cli.options import data_dir_option, json_option
from exitkit.errors import UserError
from exitkit.escaping import in_csv

if TYPE_CHECKING:
    import numpy as np

    from exitkit.runs.folder import RunFolder


@click.command(short_help="Plot how the exits of a run affect each other.")
@click.argument("run", metavar="RUN", required=False, shell_complete=runs)
@click.option("--toy", is_flag=True, help="Instead plot each gradient method's path on a toy problem.")
@click.option("--share", type=float, default=0.01, show_default=True, help="Pruned fraction of the shared parameters.")
@click.option("--out", metavar="DIR", help="Output folder.  [default: RUN/diagnostics, or toy]")
@data_dir_option
@json_option("{name of figure: PNG file}; PDF and CSV are in the same folder")
def diagnose(run: str | None, toy: bool, share: float, out: str | None, data_dir: str | None, as_json: bool) -> None:
    """Plot how the exits of a run affect each other: figures (PNG, PDF) and their values (CSV).

    Always available: the rank correlation of the exits' confidences, and the accuracy that each exit loses when the
    parameters most important to another exit are pruned. With probes (train with --probe-every N): gradient conflict,
    magnitude and variance, valid images, and sample weights if the method has any.

    \b
    Examples:
      exitkit train --method ge --probe-every 2
      exitkit diagnose runs/ge-msdnet-tiny-digits-s0-1a2b3c4d
      exitkit diagnose RUN --json
      exitkit diagnose --toy
    """
    if toy == (run is not None):
        raise UserError("expected either a RUN or --toy")
    if not 0 < share < 1:
        raise UserError(f"--share is {share}; expected above 0 and below 1")
    if toy:
        for name in ("share", "data_dir"):
            if click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise UserError(f"--{name.replace('_', '-')} has no effect on --toy; expected a RUN")
        with messages_to_stderr(as_json):
            drawn = draw_toy(Path(out or "toy"))
        _print_files(drawn, Path(out or "toy"), as_json)
        return
    from exitkit.runs.folder import DIAGNOSTICS, RunFolder

    trained = RunFolder(str(run))
    trained.results()  # raises for an unfinished run
    from exitkit.cli.progress import loading, working

    with loading("torch"):
        import torch  # noqa: F401
    folder = Path(out) if out else trained.path / DIAGNOSTICS
    with working("computing the diagnostics"), messages_to_stderr(as_json):
        drawn = draw_run(trained, folder, share, data_dir)
    if "conflict" not in drawn:
        click.echo(
            "gradient conflict, magnitude and valid images need probes, which are recorded during training; "
            f"train with: exitkit train --recipe {trained.path / 'recipe.json'} --probe-every 1",
            err=as_json,
        )
    _print_files(drawn, folder, as_json)


def messages_to_stderr(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """With --json, print messages on standard error, so that standard output is JSON only."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _print_files(drawn: Drawn, folder: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({name: str(folder / f"{name}.png") for name in drawn}, indent=2))


Drawn = dict[str, tuple[Any, Mapping[str, Any]]]
"""{name: (figure, columns of its table)}."""


def draw_toy(folder: Path) -> Drawn:
    """Plot the path of each gradient method on the toy problem, write it to a folder and print the file names."""
    drawn = _toy()
    _write(drawn, folder)
    return drawn


def draw_run(run: RunFolder, folder: Path, share: float = 0.01, data_dir: str | None = None) -> Drawn:
    """Plot all diagnostics of a finished run, write them to a folder and print the file names.

    Args:
        run: the run.
        folder: output folder.
        share: fraction of the shared parameters that is pruned, 0 < share < 1.
        data_dir: folder of the images, if they have been moved since training.
    """
    drawn = _probed(run) | _finished(run, share, data_dir)
    _write(drawn, folder)
    return drawn


def _toy() -> Drawn:
    from exitkit.benchmarks.campaign.usable import usable
    from exitkit.benchmarks.diagnose import figures, toy
    from exitkit.plugins import registered

    paths = {name: toy.path(name) for name in toy.gradient_methods(usable(list(registered("method"))))}
    rows = [(name, step, *point) for name, points in paths.items() for step, point in enumerate(points)]
    columns = dict(zip(("method", "step", "w1", "w2"), zip(*rows, strict=True), strict=True))
    return {"toy": (figures.toy_figure(paths), columns)}


def _probed(run: RunFolder) -> Drawn:
    from exitkit.benchmarks.diagnose import figures

    probes = run.probes()
    if not probes:
        return {}
    drawn: Drawn = {
        "conflict": (
            figures.conflict_figure(probes),
            _long(probes["cosine"], probes["epoch"], ("stage", "exit", "other"), "cosine"),
        ),
        "magnitude": (
            figures.magnitude_figure(probes),
            _long(probes["total_norm"], probes["epoch"], ("stage",), "norm")
            | {"variance": probes["total_variance"].ravel()},
        ),
        "validity": (
            figures.validity_figure(probes),
            _long(probes["valid"], probes["epoch"], ("exit",), "valid") | {"loss": probes["loss"].ravel()},
        ),
    }
    if "weights" in probes:
        table = _long(probes["weights"], probes["epoch"], ("image", "exit"), "weight")
        drawn["weights"] = (figures.weights_figure(probes), table | {"loss": probes["losses"].ravel()})
    return drawn


def _finished(run: RunFolder, share: float, data_dir: str | None) -> Drawn:
    from exitkit.benchmarks.diagnose import figures
    from exitkit.benchmarks.diagnose.measures import pruning_damage, rank_consistency
    from exitkit.runs.job import load_network, load_run_data

    ranks = rank_consistency(run.outputs("test")["logits"])
    data = load_run_data(run, data_dir)
    damage = pruning_damage(
        load_network(run, data), *_images(data, "validation", 512), *_images(data, "test", 2000), share
    )
    return {
        "ranks": (figures.ranks_figure(ranks), _square(ranks, ("exit", "other"), "correlation")),
        "pruning": (figures.pruning_figure(damage), _square(damage, ("pruned_for", "exit"), "points_lost")),
    }


def _images(data: Any, part: Any, limit: int) -> tuple[Any, Any]:
    """Return at most `limit` images [n, C, H, W] and labels [n] of a part, evenly spaced over it."""
    import torch

    count = len(data.labels(part))
    positions = torch.linspace(0, count - 1, min(count, limit)).round().long()
    (batch,) = data.batches(part, [positions], augment=False, seed=0)
    return batch.images, batch.labels


def _long(values: np.ndarray, epochs: np.ndarray, names: tuple[str, ...], measure: str) -> dict[str, Any]:
    """Return an array [T, ...] in long form: epoch, the indices (from 1) along its other dimensions, and the value."""
    import numpy as np

    indices = np.indices(values.shape)
    columns = {name: index.ravel() + 1 for name, index in zip(names, indices[1:], strict=True)}
    return {"epoch": epochs[indices[0].ravel()], **columns, measure: values.ravel()}


def _square(values: np.ndarray, names: tuple[str, str], measure: str) -> dict[str, Any]:
    import numpy as np

    rows, columns = np.indices(values.shape)
    return {names[0]: rows.ravel() + 1, names[1]: columns.ravel() + 1, measure: values.ravel()}


def _write(drawn: Drawn, folder: Path) -> None:
    import pandas as pd

    from exitkit.benchmarks.report.drawing import save_figure
    from exitkit.files import write_files

    writers: dict[str, Callable[[Path], object]] = {}
    for name, (figure, columns) in drawn.items():
        writers[f"{name}.csv"] = partial(in_csv(pd.DataFrame(columns)).to_csv, index=False)
        for kind in ("png", "pdf"):
            writers[f"{name}.{kind}"] = partial(save_figure, figure, kind=kind)
    write_files(folder, writers)
    click.echo(f"wrote {', '.join(drawn)} (.png, .pdf, .csv) to {folder}")
