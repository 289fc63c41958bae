"""The command line. Verbs are found through entry points and imported when used, so that help answers at once."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from exitkit import __version__
from exitkit.cli.interrupts import stopped_for_good, stopping_at_once
from exitkit.errors import Interrupted, Note, UserError, unknown

_FIRST_STEPS = """Train multi-exit networks with every published method, and compare them under one recipe.

\b
First steps:
  exitkit compare --methods ge,boostnet,metagf     a table of four methods, in minutes, on the digits
  exitkit train --method boostnet                  one run
  exitkit list methods                             what there is
"""


class Verbs(click.Group):
    """A group whose commands are the entry points `exitkit.commands`, ours and anyone else's."""

    @property
    def points(self) -> dict[str, EntryPoint]:
        """The verbs by name."""
        return {point.name: point for point in sorted(entry_points(group="exitkit.commands"), key=lambda p: p.name)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all verbs."""
        return list(self.points)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        point = self.points.get(cmd_name)
        if point is None:
            raise unknown("command", cmd_name, self.points)
        command: click.Command = point.load()
        return command


@click.group(cls=Verbs, help=_FIRST_STEPS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="exitkit")
def cli() -> None:
    """Hold the verbs."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2, an interrupt exit code 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = _format_warning
    try:
        with stopping_at_once():
            code = cli.main(args=arguments, prog_name="exitkit", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort, Interrupted) as stop:
        stopped_for_good()
        _fail(str(stop) or "stopped", 130)
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        click.echo(help_wanted.format_message())
        code = 0
    except click.ClickException as error:
        _fail(_one_line(error.format_message()), 2)
    except UserError as error:
        _fail(_one_line(str(error)), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, Note):
        return f"exitkit: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _fail(message: str, code: int) -> Any:
    click.echo(f"exitkit: {message}", err=True)
    sys.exit(code)
