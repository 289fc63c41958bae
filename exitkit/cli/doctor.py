"""`exitkit doctor`: is everything in place, and if not, what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from exitkit.cli.completion import folders

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
    from rich.text import Text

    from exitkit.cli.doctor_checks import Finding, checks

    found: list[Finding] = []
    console = Console(highlight=False)
    for finding in checks(Path(data_dir) if data_dir else None, Path(out)):
        found.append(finding)
        if not as_json:  # one by one: to import torch, or to read images, takes its time
            line = Text.assemble((f"{finding.state:6}", _STYLES[finding.state]), (finding.check, "bold"))
            console.print(Text.assemble(line, "  ", finding.detail), soft_wrap=not console.is_terminal)
            if finding.hint:
                console.print(Text(f"      {finding.hint}", style="dim"), soft_wrap=not console.is_terminal)
    wrong = [finding.check for finding in found if finding.state == "wrong"]
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        console.print(f"wrong: {', '.join(wrong)}" if wrong else "everything that is needed is in place")
    sys.exit(1 if wrong else 0)
