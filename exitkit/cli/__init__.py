"""The command line. Verbs are found through entry points and imported when used, so that help answers at once."""

from __future__ import annotations

import functools
import io
import os
import sys
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from exitkit.cli.interrupts import stopped_for_good, stopping_at_once
from exitkit.errors import Interrupted, UserError, format_warning, unknown

COMPLETION = "_EXITKIT_COMPLETE"
"""The variable by which a shell asks for what could stand at the end of a line."""

_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What click raises for a group without a command; before 8.2 it printed the group's help itself."""

_FIRST_STEPS = """Train multi-exit networks with every published method, and compare them under one recipe.

\b
First steps:
  exitkit compare --methods ge,boostnet,metagf   a table of four methods
  exitkit train --method boostnet                one run
  exitkit list methods                           what there is
  exitkit doctor                                 is everything in place?
"""


@functools.lru_cache(maxsize=1)
def _points(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return the verbs that are installed on a path; to ask every package costs a help page more than all else."""
    return {point.name: point for point in sorted(entry_points(group="exitkit.commands"), key=lambda p: p.name)}


class Verbs(click.Group):
    """A group whose commands are the entry points `exitkit.commands`, ours and anyone else's."""

    @property
    def points(self) -> dict[str, EntryPoint]:
        """The verbs by name."""
        return _points(tuple(sys.path))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all verbs."""
        return [*self.points]  # `list` is also a module of this package

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb; one of a package that is broken stands in the help with what is wrong."""
        point = self.points.get(cmd_name)
        if point is None:
            if COMPLETION in os.environ:
                return None  # the shell asks while the line is still being typed
            raise unknown("command", cmd_name, self.points)
        try:
            command = point.load()
        except Exception as error:  # whatever someone's module raises while it is imported
            return Broken(point, f"{type(error).__name__}: {error}")
        return command if isinstance(command, click.Command) else Broken(point, "it is no click command")


class Broken(click.Command):
    """Stands in the place of a command that does not load, and says why.

    Args:
        point: where it should have come from.
        reason: what was wrong.
    """

    def __init__(self, point: EntryPoint, reason: str) -> None:
        self.reason = f"command {point.name!r} ({point.value}) does not load: {_one_line(reason)}"
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        about = f"Not usable: {_one_line(reason)}."
        super().__init__(point.name, callback=self.refuse, help=about, context_settings=settings, add_help_option=False)

    def refuse(self) -> None:
        """Refuse to run."""
        raise UserError(self.reason)


@click.group(
    cls=Verbs,
    help=_FIRST_STEPS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="exitkit", prog_name="exitkit")
@click.pass_context
def cli(context: click.Context) -> None:
    """Hold the verbs; alone, say what to do next."""
    if context.invoked_subcommand is None:
        from exitkit.cli.welcome import welcome

        click.echo(welcome())


def main(arguments: list[str] | None = None, command: click.Command = cli) -> None:
    """Run the command line, or another command as it would.

    A user's mistake is one line on stderr and exit code 2, an interrupt exit code 130.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        with stopping_at_once():
            code = command.main(args=arguments, prog_name="exitkit", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort, Interrupted) as stop:
        stopped_for_good()
        _fail(str(stop) or "stopped", 130)
    except _NO_ARGUMENTS as help_wanted:
        click.echo(help_wanted.format_message())
        code = 0
    except click.ClickException as error:
        _fail(_one_line(error.format_message()), 2)
    except UserError as error:
        _fail(_one_line(str(error)), 2)
    except OSError as error:
        if not error.filename:
            raise
        # What was named can't be a file, or is not one: a name too long, a folder, one without permission.
        _fail(_one_line(f"{error.filename}: {(error.strerror or str(error)).lower()}"), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _fail(message: str, code: int) -> Any:
    click.echo(f"exitkit: {message}", err=True)
    sys.exit(code)
