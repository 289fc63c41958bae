"""The command line. Commands are found through entry points and imported when used, so that help is fast."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import sys
import warnings
from typing import Any

import click

from exitkit.cli.interrupts import stopped_for_good, stopping_at_once
from exitkit.entry_points import OWN, Point, by_name, foreign, installed, several
from exitkit.errors import Interrupted, Note, UserError, print_warnings, unknown
from exitkit.escaping import one_line

COMPLETION = "_EXITKIT_COMPLETE"
"""The environment variable through which a shell requests completions."""

_NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""Raised by click for a group without a command; before version 8.2 click printed the group's help itself."""

_DISK_ERRORS = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ESTALE", "ENOLCK", "ETIMEDOUT", "EHOSTDOWN", "ENODEV")
_DISK = {getattr(errno, name) for name in _DISK_ERRORS if hasattr(errno, name)}
"""Errors of writing, which the system reports without the name of the file; Windows does not have all of them."""

_FIRST_STEPS = """Train multi-exit networks with the published methods, and compare them under one recipe.

\b
First steps:
  exitkit compare --methods ge,boostnet,metagf   compare with joint training
  exitkit train --method boostnet                train one run
  exitkit list methods                           list all methods
  exitkit doctor                                 check the installation
"""


@functools.lru_cache(maxsize=1)
def _entry_points(path: tuple[str, ...]) -> dict[str, list[Point]]:
    """Return the commands installed on `path`, cached: the search takes most of the time of a help page."""
    return by_name(installed("exitkit.commands"))


class Verbs(click.Group):
    """A group whose commands are the entry points `exitkit.commands` of all installed packages."""

    @property
    def points(self) -> dict[str, list[Point]]:
        """The entry points of the commands by name; several for a name that several packages have."""
        return _entry_points(tuple(sys.path))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return [*self.points]  # `list` is also a module of this package

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; if it does not load, the help shows the error in its place.

        A command of exitkit is kept if another package has one of the same name.
        """
        points = self.points.get(cmd_name)
        if points is None:
            if COMPLETION in os.environ:
                return None  # during completion, an unfinished word is not an error
            raise unknown("command", cmd_name, self.points)
        packages = ", ".join(point.package for point in points)
        if len(points) > 1 and points[0].package != OWN:
            return Broken(cmd_name, packages, several(f"command {cmd_name!r}", points))
        if len(points) > 1:
            warnings.warn(Note(f"{several(f'command {cmd_name!r}', points)}; that of exitkit is used"), stacklevel=1)
        try:
            return _loaded(points[0])
        except UserError as error:
            return Broken(cmd_name, packages, str(error))


def _loaded(point: Point) -> click.Command:
    """Import a command.

    Raises:
        UserError: it does not load, is not a command, or has no help; the message names its package.
    """
    label = f"command {point.name!r} ({point.value}) does not load"
    with foreign(label, point.package):
        command = point.load()
        if isinstance(command, click.Command):
            f"{command.hidden} {command.get_short_help_str(60)}"  # as the help of all commands calls it
            return command
    raise UserError(f"{label}: it is not a click command (package {point.package})")


class Broken(click.Command):
    """A placeholder of a command that does not load; its help and its error state the reason.

    Args:
        name: the name of the command.
        package: the package that provides it.
        reason: why it does not load.
    """

    def __init__(self, name: str, package: str, reason: str) -> None:
        self.reason = one_line(reason)
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        short = f"Not usable (package {package})."
        super().__init__(name, callback=self.refuse, short_help=short, context_settings=settings, add_help_option=False)

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
    print_warnings()
    if COMPLETION in os.environ:
        warnings.simplefilter("ignore")  # a message would appear in the middle of the user's line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be valid text
    try:
        with stopping_at_once():
            code = command.main(args=arguments, prog_name="exitkit", standalone_mode=False)
            sys.stdout.flush()  # here, and not at the end of the process, an error can be handled
    except (KeyboardInterrupt, click.Abort, Interrupted) as stop:
        if isinstance(stop.__cause__, EOFError):  # click takes the end of any file for the end of standard input
            raise stop.__cause__ from None
        stopped_for_good()
        _fail(str(stop) or "stopped", 130)
    except _NO_ARGUMENTS as no_arguments:
        click.echo(no_arguments.format_message())
        code = 0
    except click.ClickException as error:
        _fail(one_line(error.format_message()), 2)
    except UserError as error:
        _fail(one_line(str(error)), 2)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read the output has ended
            _discard_output()
            sys.exit(1)
        if error.errno in _DISK and not error.filename:
            _discard_output()
            _fail(one_line(f"a file can't be written: {(error.strerror or str(error)).lower()}"), 2)
        if not error.filename:
            raise
        # The path can't be used as a file: its name is too long, it is a folder, or permission is missing.
        _fail(one_line(f"{error.filename}: {(error.strerror or str(error)).lower()}"), 2)
    sys.exit(code if isinstance(code, int) else 0)


def run_command(*words: object) -> None:
    """Run a command in this process: for methods, networks and data sets that a script has registered.

    Example: `exitkit.run_command("compare", "--methods", "ge", "--dataset", "mine", "--launcher", "here")`

    Args:
        words: the command and its arguments, as in a shell; other types than text are converted.

    Raises:
        UserError: what the command would have printed as its error.
    """
    try:
        cli.main(args=[str(word) for word in words], prog_name="exitkit", standalone_mode=False)
    except click.ClickException as error:
        raise UserError(one_line(error.format_message())) from None


def _discard_output() -> None:
    """Discard what standard output still holds, so that the end of the process does not try to write it again."""
    with contextlib.suppress(OSError, ValueError):  # it is no file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> Any:
    click.echo(f"exitkit: {message}", err=True)
    sys.exit(code)
