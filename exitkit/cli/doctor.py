"""`exitkit doctor`: is everything in place, and if not, what to do."""

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


@click.command(short_help="Check that everything is in place.")
@click.option("--data-dir", metavar="DIR", help="Where the images lie.  [default: data]", shell_complete=folders)
@click.option("--out", metavar="DIR", default="runs", show_default=True, help="Where runs go.", shell_complete=folders)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an array of {check, state, detail, hint}.")
def doctor(data_dir: str | None, out: str, as_json: bool) -> None:
    """Check versions, devices, data, folders, optional parts and plugins; say what to do where something is missing.

    The exit code is 1 if anything is "wrong", 0 if all is "ok" or worth a "note" only. Nothing is downloaded.

    \b
    Examples:
      exitkit doctor
      exitkit doctor --data-dir data --out runs
      exitkit doctor --json
    """
    from rich.console import Console

    from exitkit.cli.doctor_checks import checks

    found: list[Finding] = []
    console = Console(highlight=False)
    for finding in checks(Path(data_dir) if data_dir else None, Path(out)):
        found.append(finding)
        if not as_json:  # one by one: to import torch, or to read images, takes its time
            console.print(_line(finding), soft_wrap=not console.is_terminal)
    wrong = [finding.check for finding in found if finding.state == "wrong"]
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        told = f"wrong: {', '.join(wrong)}" if wrong else "everything that is needed is in place"
        console.print(told, markup=False)
    sys.exit(1 if wrong else 0)


def _line(finding: Finding) -> Table:
    """Lay one finding out: state, what was looked at, what was found and below it what to do."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=5, style=_STYLES[finding.state])
    table.add_column(width=18, style="bold", overflow="fold")
    table.add_column(overflow="fold")
    hint = [("\n" + finding.hint, "dim")] if finding.hint else []
    table.add_row(finding.state, Text(finding.check), Text.assemble(finding.detail, *hint))
    return table
