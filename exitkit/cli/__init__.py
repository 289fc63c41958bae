"""The command line. Commands are found through entry points and imported when used, so that help is fast."""

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
"""The environment variable through which a shell requests completions."""

_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""Raised by click for a group without a command; before version 8.2 click printed the group's help itself."""

_FIRST_STEPS = """Train multi-exit networks with every published method, and compare them under one recipe.

\b
First steps:
  exitkit compare --methods ge,boostnet,metagf   compare with joint training
  exitkit train --method boostnet                train one run
  exitkit list methods                           list all methods
  exitkit doctor                                 check the installation
"""


@functools.lru_cache(maxsize=1)
def _entry_points(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return the commands installed on `path`, cached: the search takes most of the time of a help page."""
    return {point.name: point for point in sorted(entry_points(group="exitkit.commands"), key=lambda p: p.name)}


class Verbs(click.Group):
    """A group whose commands are the entry points `exitkit.commands` of all installed packages."""

    @property
    def points(self) -> dict[str, EntryPoint]:
        """The entry points of the commands by name."""
        return _entry_points(tuple(sys.path))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return [*self.points]  # `list` is also a module of this package

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; if it does not load, the help shows the error in its place."""
        point = self.points.get(cmd_name)
        if point is None:
            if COMPLETION in os.environ:
                return None  # during completion, an unfinished word is not an error
            raise unknown("command", cmd_name, self.points)
        try:
            command = point.load()
        except Exception as error:  # a module may raise any error on import
            return Broken(point, f"{type(error).__name__}: {error}")
        return command if isinstance(command, click.Command) else Broken(point, "it is not a click command")


class Broken(click.Command):
    """A placeholder of a command that does not load; its help and its error state the reason.

    Args:
        point: the entry point of the command.
        reason: why it does not load.
    """

    def __init__(self, point: EntryPoint, reason: str) -> None:
        self.reason = f"command {point.name!r} ({point.value}) does not load: {_one_line(reason)}"
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        about = f"Not usable: {_one_line(reason)}."
        super().__init__(point.name, callback=self.refuse, help=about, context_settings=settings, add_help_option=False)

    def refuse(self) -> None:
        """Raise the error."""
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
    """Run a command; without a command, print the next steps."""
    if context.invoked_subcommand is None:
        from exitkit.cli.welcome import welcome

        click.echo(welcome())


def main(arguments: list[str] | None = None, command: click.Command = cli) -> None:
    """Run the command line, or another click command with the same error handling.

    A user error prints one line on stderr and exits with code 2; an interrupt exits with code 130.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        with stopping_at_once():
            code = command.main(args=arguments, prog_name="exitkit", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort, Interrupted) as stop:
        stopped_for_good()
        _fail(str(stop) or "stopped", 130)
    except _NO_ARGUMENTS as no_arguments:
        click.echo(no_arguments.format_message())
        code = 0
    except click.ClickException as error:
        _fail(_one_line(error.format_message()), 2)
    except UserError as error:
        _fail(_one_line(str(error)), 2)
    except OSError as error:
        if not error.filename:
            raise
        # The path can't be used as a file: its name is too long, it is a folder, or permission is missing.
        _fail(_one_line(f"{error.filename}: {(error.strerror or str(error)).lower()}"), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _fail(message: str, code: int) -> Any:
    click.echo(f"exitkit: {message}", err=True)
    sys.exit(code)
