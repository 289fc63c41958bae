"""`exitkit claims`: test the papers' claims on the runs of studies, and write the results as one document."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exitkit.errors import UserError, unknown
from exitkit.files import exists, write_text

if TYPE_CHECKING:
    from exitkit.benchmarks.report.claims import Claim, Verdict
    from exitkit.runs.folder import RunFolder

_MARK = "<!-- made by `exitkit claims` -->"
_LEGEND = """\
# Claims of the papers, tested

{mark}

Each claim has one test (`benchmarks/published/claims.toml`). The tests of claims 29 to 41 were committed before any of
their results; for the others see *fixed in* below. A test is a difference of measures of some methods, for each seed;
accuracies and areas are in percentage points. The area under the budgeted curve is its mean height between the first
and the last budget of the study; in a report, it is the mean height over all costs that all runs reach. The verdict
comes from the 95 % interval of Student's t over n seeds: *supported* if the interval is above 0, *contradicted* if it
is below 0, else *undecided at this scale*. If the difference is the same for all seeds, it is that value, without p.
*Visible* is half the width of the interval, the smallest effect that the study could have shown. p is two-sided and
corrected by Holm's method for all tests of this page. One of twenty true hypotheses of no difference is rejected by
chance: a verdict whose corrected p is above 0.05 is weak. *Fixed in* is the commit that fixed the test. `f159a44` also
has the results of 1, 2, 6, 7, 9 to 11, 13 and 22 to 28, since the commits before it were lost: that their tests are
older cannot be checked. When it was made, 10 of the 12 runs of Meta-GF in few-labels (claims 17 and 18) had ended as
well; those that they are compared with had not begun. The tests of policies-cifar100 were written when the runs of
cifar100, whose networks it uses, had begun and none had finished. A pilot of one seed and 5 epochs on CIFAR-100, in
which boostnet was better than ge and ge better than joint, was known when these tests and those of cifar100 were
written.

## What differs from the papers' experiments

Our networks are smaller and our schedules are shorter than those of the papers. Where a verdict differs from a paper,
that may be the reason.

{experiments}

## Claims and verdicts
"""
_HEADS = ["", "claim", "made in", "test", "fixed in", "difference", "visible", "n", "p (Holm)", "verdict"]


@click.command(short_help="Test the papers' claims on finished studies.")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", default="CLAIMS.md", show_default=True, help="Output file.")
def claims(folders: tuple[str, ...], out: str) -> None:
    """Test the claims of the papers on the studies in the FOLDERs, and write one document.

    Each FOLDER is the output folder of a study, or its summary, and has the name of the study: `exitkit list recipes`
    shows the studies. Claims whose study is not given, or not finished, are listed as not tested yet. Nothing is
    trained.

    \b
    Example:
      exitkit claims docs/results/fashion-mnist docs/results/few-labels
    """
    from exitkit.benchmarks.campaign.record import read_plan
    from exitkit.benchmarks.report import ReportOptions
    from exitkit.benchmarks.report.claims import judge, load_claims
    from exitkit.cli.catalogue import recipe_files
    from exitkit.runs.table import find_runs, intact

    target = Path(out)
    if target.is_dir():
        raise UserError(f"--out {target} is a folder; expected a file")
    if exists(target) and _MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{target} was not written by this command; choose another file with --out")
    shipped = load_claims()
    known = [name.removeprefix("study-") for name in recipe_files() if name.startswith("study-")]
    studies: dict[str, tuple[list[RunFolder], ReportOptions]] = {}
    for folder in map(Path, folders):
        runs, name = intact(find_runs(folder)), folder.resolve().name
        if name not in known:
            raise unknown("study", name, known)
        if name in studies:
            raise UserError(f"two folders are called {name}; expected one of each study")
        studies[name] = runs, ReportOptions.make(read_plan(folder).report)
    verdicts = [judge(claim, *studies.get(claim.study, ([], ReportOptions()))) for claim in shipped]
    write_text(target, _document(shipped, verdicts))
    decided = sum(verdict.verdict in ("supported", "contradicted") for verdict in verdicts)
    tested = sum(verdict.n > 1 for verdict in verdicts)
    click.echo(f"wrote {target}: {len(shipped)} claims, {tested} tested, {decided} supported or contradicted")


def _document(shipped: list[Claim], verdicts: list[Verdict]) -> str:
    import pandas as pd

    from exitkit.benchmarks.report.claims import load_experiments
    from exitkit.benchmarks.report.statistics import holm

    rows = []
    for number, (claim, verdict, p) in enumerate(
        zip(shipped, verdicts, holm([verdict.p for verdict in verdicts]), strict=True), 1
    ):
        known = verdict.n > 1
        interval = f"{verdict.mean:+.2f} [{verdict.low:+.2f}, {verdict.high:+.2f}]"
        difference = interval.replace("-", "\N{MINUS SIGN}") if known else "–"
        numbers = [
            difference,
            "–" if math.isnan(verdict.visible) else f"{verdict.visible:.2f}",
            str(verdict.n),
            "–" if math.isnan(p) else f"{p:.3g}",
        ]
        facts = [claim.claim, claim.source, f"{claim.study}: {claim.test}", f"`{claim.fixed}`"]
        rows.append([str(number), *facts, *numbers, verdict.verdict])
    table = pd.DataFrame(rows, columns=_HEADS).to_markdown(index=False, disable_numparse=True)
    experiments = load_experiments().rename(columns={"name": ""}).to_markdown(index=False)
    return f"{_LEGEND.format(mark=_MARK, experiments=experiments)}\n{table}\n"
