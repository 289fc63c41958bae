"""`exitkit reproducibility`: one Markdown document that compares run folders with the papers' results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from exitkit.errors import UserError
from exitkit.escaping import code_in_markdown, counted, in_markdown
from exitkit.files import exists, write_text

if TYPE_CHECKING:
    from exitkit.benchmarks.campaign.record import Comparisons
    from exitkit.benchmarks.report import Comparison
    from exitkit.runs.folder import RunFolder

CONFIDENCE = 0.95
_HEADS = [
    *("method", "network", "data", "epochs", "n", "ours (mean)", "ours (last exit)", "published (mean, last)"),
    *("against the paper", "against the baseline", "training"),
]
_MARK = "<!-- made by `exitkit reproducibility` -->"
_LEGEND = f"""\
# Reproducibility

{_MARK}

Results of exitkit beside the published results. Accuracies are top-1 on the test images, in percent: the mean over all
exits, and the last exit, ± standard deviation over n seeds (n - 1).

*Against the paper*: "as published" if the paper's mean over the exits is in the {CONFIDENCE:.0%} prediction interval of
one further run of ours (Student's t over our seeds), otherwise "above" or "below" (our mean against the paper's); "one
seed" if there is no interval. "not comparable" lists what differs from the paper's experiment; no verdict is given
then.

*Against the baseline*: the difference of the mean height of the budgeted-batch curve, paired by seed, with its 95 %
interval; "*" if it is significant (p < 0.05 after Holm's correction for the methods of the table).
"""


class Score(NamedTuple):
    """Mean accuracy over the exits, and accuracy of the last exit, in percent, over n seeds (sd is NaN if n = 1)."""

    mean: float
    mean_sd: float
    last: float
    last_sd: float
    n: int


@click.command(short_help="Compare runs with the papers' results.")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", default="REPRODUCIBILITY.md", show_default=True, help="Output file.")
def reproducibility(folders: tuple[str, ...], out: str) -> None:
    """Write one document about the comparisons in the FOLDERs.

    For each comparison it contains our accuracy, the published one, a verdict, the command, the hardware and the
    training time. Each FOLDER is an output folder of `exitkit compare` or `train`. Nothing is trained.

    \b
    Examples:
      exitkit reproducibility runs
      exitkit reproducibility studies/* --out docs/REPRODUCIBILITY.md
    """
    target = Path(out)
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; expected a file")
    if exists(target) and _MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{target} was not written by this command; choose another file with --out")
    places = [Path(folder) for folder in folders]
    twice = [place for number, place in enumerate(places) if place.resolve() in [p.resolve() for p in places[:number]]]
    if twice:
        raise UserError(f"{twice[0]} is given twice; expected each folder once")
    written = [section for place in places for section in sections(place)]
    write_text(target, "\n".join([_LEGEND, *written]))
    click.echo(f"wrote {target}: {counted(len(written), 'comparison')}")


def sections(folder: Path) -> list[str]:
    """Return the sections of the document for one folder of runs: one per comparison, or one of all its runs.

    Raises:
        UserError: the folder has no finished run, or a file in it is damaged.
    """
    from exitkit.benchmarks.campaign.record import plans, read_plan

    files = plans(folder) if folder.is_dir() else []
    return [_section(read_plan(source)) for source in (files if len(files) > 1 else [folder])]


def _section(comparisons: Comparisons) -> str:
    from exitkit.benchmarks.report import ReportOptions, collect_intact
    from exitkit.benchmarks.report.document import lead, title
    from exitkit.benchmarks.report.provenance import commands, hardware, versions
    from exitkit.runs.table import find_runs, intact

    folder, context, order = comparisons.folder, comparisons.context, comparisons.order
    position = {name: number for number, name in enumerate(order)}
    finished = intact(find_runs(folder), records=True)
    runs = sorted(finished, key=lambda run: (position.get(run.path.name, len(position)), run.path.name))
    if order:
        runs = [run for run in runs if run.path.name in position]  # without teachers
    comparison, runs = collect_intact(runs, ReportOptions.make(comparisons.report), context)
    facts = [f"- {name}: {code_in_markdown(line)}" for name, line in commands(context, runs)]
    facts += [f"- hardware: {in_markdown(hardware(runs))}", f"- versions: {in_markdown(versions(runs))}"]
    facts.append(f"- time: {_time(runs)}")
    keys = ["method", "backbone", "dataset", "reason"]
    for (method, backbone, dataset, reason), seeds in comparison.missing.groupby(keys, sort=False)["seed"]:
        numbers = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        absent = f"{method} on {backbone}, {dataset}, {numbers} ({reason})"
        facts.append(f"- missing: {in_markdown(absent)}")
    heading = in_markdown(title(comparison) if context.title else folder.resolve().name)
    parts = [f"## {heading}", *map(in_markdown, lead(comparison)), "\n".join(facts)]
    return "\n\n".join([*parts, _table(comparison, runs)]) + "\n"


def _table(comparison: Comparison, runs: Sequence[RunFolder]) -> str:
    import pandas as pd

    from exitkit.benchmarks.campaign.estimate import in_words
    from exitkit.benchmarks.report.comparison import STATIC

    groups: dict[Any, list[RunFolder]] = {}
    for run in runs:
        if (names := comparison.names[run.path.name]).method != STATIC:  # of static networks, one exit is trained
            groups.setdefault(names, []).append(run)
    rows = []
    for names, seeds in groups.items():
        score = _score([run.results()["test"] for run in seeds])
        paper, verdict = _against_paper(score, _of(comparison.published, names))
        seconds = sum(run.training_cost()["seconds"] for run in seeds) / len(seeds)
        time = in_words(seconds) if comparison.options.times else "–"
        ours = [_spread(score.mean, score.mean_sd), _spread(score.last, score.last_sd)]
        facts = [*map(in_markdown, names), str(seeds[0].recipe.epochs), str(score.n), *ours, paper, verdict]
        rows.append([*facts, _against_baseline(_of(comparison.differences, names)), time])
    align = ["left"] * 3 + ["right"] * 4 + ["left"] * 3 + ["right"]
    frame = pd.DataFrame(rows, columns=list(_HEADS))
    return str(frame.to_markdown(index=False, disable_numparse=True, colalign=align))


def _of(frame: Any, names: Any) -> Any:
    return frame[(frame[["method", "backbone", "dataset"]] == list(names)).all(axis=1)]


def _score(accuracies: Sequence[Sequence[float]]) -> Score:
    import numpy as np

    values = np.asarray(accuracies, dtype=np.float64)
    means, last, n = values.mean(1), values[:, -1], len(values)
    spread = [float(part.std(ddof=1)) if n > 1 else math.nan for part in (means, last)]
    return Score(float(means.mean()), spread[0], float(last.mean()), spread[1], n)


def _against_paper(score: Score, published: Any) -> tuple[str, str]:
    """Return the published accuracies, one per table, and the verdicts on them."""
    from exitkit.benchmarks.report.narrow_tables import unlike_published

    accuracies, verdicts = [], []
    for (paper, table), rows in published.groupby(["paper", "table"], sort=False):
        by_exit = rows.set_index("exit")["published"].sort_index()
        accuracies.append(f"{by_exit.mean():.2f}, {by_exit.iloc[-1]:.2f} ({paper}, {table})")
        unlike = unlike_published(rows)
        verdicts.append(f"not comparable: other {', '.join(unlike)}" if unlike else verdict(score, by_exit.mean()))
    return "; ".join(accuracies) or "–", "; ".join(dict.fromkeys(verdicts)) or "–"


def verdict(score: Score, published: float) -> str:
    """Return "as published", "above" or "below" (our mean against the published one), or "one seed".

    "as published" means that the published mean is in the prediction interval of one further run of ours.
    """
    from scipy import stats

    if score.n < 2:
        return "one seed"
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, score.n - 1)) * score.mean_sd * math.sqrt(1 + 1 / score.n)
    if abs(score.mean - published) <= half_width:
        return "as published"
    return "above" if score.mean > published else "below"


def _against_baseline(rows: Any) -> str:
    area = rows[rows["measure"] == "area"]
    if not len(area):
        return "–"
    row = area.iloc[0]
    star = "*" if row["p_holm"] < 0.05 else ""
    interval = "" if math.isnan(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    return f"{row['mean']:+.2f}{star}{interval} to {row['baseline']}"


def _spread(mean: float, sd: float) -> str:
    return f"{mean:.2f}" if math.isnan(sd) else f"{mean:.2f} ± {sd:.2f}"


def _time(runs: Sequence[RunFolder]) -> str:
    from exitkit.benchmarks.campaign.estimate import in_words

    seconds = sum(run.training_cost()["seconds"] for run in runs)
    return f"{in_words(seconds)} of training over {counted(len(runs), 'run')}"
