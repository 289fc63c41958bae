"""`exitkit doctor`: checks of the installation, the devices and the data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exitkit.cli.completion import folders

if TYPE_CHECKING:
    from rich.table import Table

    from exitkit.cli.doctor_checks import Finding

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


@click.command(short_help="Check the installation, devices and data.")
@click.option("--data-dir", metavar="DIR", help="Folder of the images.  [default: data]", shell_complete=folders)
@click.option("--out", metavar="DIR", default="runs", show_default=True, help="Folder of runs.", shell_complete=folders)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an array of {check, state, detail, hint}.")
def doctor(data_dir: str | None, out: str, as_json: bool) -> None:
    """Check versions, devices, data, folders, optional packages and plugins, and print how to solve problems.

    The exit code is 1 if any check is "wrong", and 0 if all are "ok" or "note". Nothing is downloaded.

    \b
    Examples:
      exitkit doctor
      exitkit doctor --data-dir data --out runs
      exitkit doctor --json
    """
    from exitkit.cli.doctor_checks import checks
    from exitkit.cli.terminal import Console

    findings: list[Finding] = []
    console = Console(highlight=False)
    for finding in checks(Path(data_dir) if data_dir else None, Path(out)):
        findings.append(finding)
        if not as_json:  # printed one by one: importing torch and reading images take time
            console.print(_line(finding), soft_wrap=not console.is_terminal)
    wrong = [finding.check for finding in findings if finding.state == "wrong"]
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        conclusion = f"wrong: {', '.join(wrong)}" if wrong else "all required checks passed"
        console.print(conclusion, markup=False)
    sys.exit(1 if wrong else 0)


def _line(finding: Finding) -> Table:
    """Return one row: state, check and detail, with the hint below the detail."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=5, style=_STYLES[finding.state])
    table.add_column(width=18, style="bold", overflow="fold")
    table.add_column(overflow="fold")
    hint = [("\n" + finding.hint, "dim")] if finding.hint else []
    table.add_row(finding.state, Text(finding.check), Text.assemble(finding.detail, *hint))
    return table
