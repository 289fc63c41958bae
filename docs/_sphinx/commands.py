"""Directive for the help of a command.

{command} train      what it does, its options and examples, and the same of its subcommands
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from exitkit.cli import cli

_OPTION = re.compile(r"(`[^`]*`)|((?<![\w-])--[a-z][\w-]*)")


class Command(Directive):
    """The help of a command: as `exitkit COMMAND --help` prints it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return usage, text and options of the command, then those of its subcommands."""
        command = cli.get_command(click.Context(cli), self.arguments[0])
        assert command is not None
        text = "\n".join(_page(command, f"exitkit {self.arguments[0]}"))
        container = nodes.container(classes=["command"])
        self.state.nested_parse(StringList(text.splitlines(), "commands"), self.content_offset, container)
        return [container]


def _page(command: click.Command, path: str) -> Iterator[str]:
    """Yield the lines of MyST text about a command, and about its subcommands."""
    context = click.Context(command, info_name=path)
    yield from ("```text", " ".join([path, *command.collect_usage_pieces(context)]), "```", "")
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            _, title, *examples = paragraph.splitlines()
            yield from (title, "", "```sh", *(line.removeprefix("  ") for line in examples), "```", "")
        else:
            yield from (_marked(paragraph), "")
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [record for record in records if record and record[1]]  # arguments have no text of their own
    if rows:
        yield from ("| option | meaning |", "|---|---|")
        for names, meaning in rows:
            yield f"| `{names}` | {_marked(' '.join(meaning.split()))} |"
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from _page(subcommand, f"{path} {name}")


def _marked(text: str) -> str:
    """Return help text with options as code: typography would make dashes of their hyphens."""
    return _OPTION.sub(lambda match: match[1] or f"`{match[2]}`", text)


def setup(app: object) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command", Command)  # type: ignore[attr-defined]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
