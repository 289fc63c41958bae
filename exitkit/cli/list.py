"""`exitkit list`: lists methods, backbones, data sets and recipes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import names, one_of
from exitkit.cli.options import json_option
from exitkit.errors import UserError, unknown

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from exitkit.cli.catalogue import Entry
    from exitkit.cli.terminal import Console


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of an entry of the catalogue given before."""
    from exitkit.cli.catalogue import CATALOGUES

    kind = context.params.get("what")
    return names(kind)(context, parameter, incomplete) if kind in CATALOGUES else []


@click.command("list", short_help="List methods, backbones, data sets and recipes.")
@click.argument(
    "what",
    required=False,
    metavar="[methods|backbones|datasets|recipes]",
    shell_complete=one_of("methods", "backbones", "datasets", "recipes"),
)
@click.argument("name", required=False, metavar="[NAME]", shell_complete=_complete)
@json_option("an array of objects, one per entry")
def list_command(what: str | None, name: str | None, as_json: bool) -> None:
    """List methods, backbones, data sets and recipes.

    Without arguments, list all names. With a catalogue, list its entries with the default and meaning of each field,
    and presets with the fields that they change. With a NAME, list only this entry, with all fields.

    \b
    Examples:
      exitkit list
      exitkit list methods
      exitkit list methods boostnet
      exitkit list datasets --json
    """
    from exitkit.cli.catalogue import CATALOGUES, entries, kind_of
    from exitkit.plugins import load

    if what is not None and what not in CATALOGUES:
        if kind := kind_of(what):
            raise UserError(f"{what} is one of the {kind}; try: exitkit list {kind} {what}")
        raise unknown("list", what, CATALOGUES)
    if what is not None and name is not None:
        known = {entry["name"]: entry for entry in entries(what)}
        # The parts of a composition (ge+ofa), or the plugin of a name with a value (torchvision:resnet18).
        parts = name.split("+") if what == "methods" else [name.partition(":")[0]]
        for part in parts:
            if part not in known:
                raise unknown(_WORDS[what], part, known)
        if ":" in name and what in ("backbones", "datasets"):
            load(what.removesuffix("s"), name)  # refuses a value of a plugin that has none
        if as_json:
            click.echo(json.dumps([known[part] for part in parts], indent=2))
        else:
            from exitkit.cli.terminal import Console

            for part in parts:
                _print_entry(Console(highlight=False), what, known[part])
    elif as_json:
        listed = {kind: entries(kind) for kind in ([what] if what else CATALOGUES)}
        if what:
            click.echo(json.dumps(listed[what], indent=2))
        else:
            merged = [{"kind": kind.removesuffix("s"), **entry} for kind, group in listed.items() for entry in group]
            click.echo(json.dumps(merged, indent=2))
    elif what is None:
        _print_names()
    else:
        _print_entries(what)


_WORDS = {"methods": "method", "backbones": "backbone", "datasets": "data set", "recipes": "recipe"}
"""The word for one entry of each catalogue."""


def _print_names() -> None:
    from rich.markup import escape
    from rich.table import Table

    from exitkit.cli.catalogue import CATALOGUES, entries
    from exitkit.cli.terminal import Console

    console = Console()
    for kind in CATALOGUES:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column()
        console.print(f"[bold]{kind}[/bold]")
        if kind == "methods":
            _print_groups(console)
            continue
        for entry in entries(kind):
            table.add_row(escape(entry["name"]), escape(entry["summary"]))
        console.print(table)
    console.print(
        "`exitkit list methods` (or backbones, datasets) lists all fields for --set, `exitkit list methods NAME` those "
        "of one method",
        highlight=False,
        markup=False,
    )


def _print_groups(console: Console) -> None:
    """Print the methods by what they change, with venue and year of their papers."""
    from rich.markup import escape
    from rich.table import Table

    from exitkit.cli.catalogue import GROUPS, entries, venue

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for group in GROUPS.values():
        table.add_row(f"[bold default]{group}[/]", "", "")
        for entry in entries("methods"):
            if entry["group"] == group:
                table.add_row(escape(entry["name"]), escape(venue(entry)), escape(entry["summary"]))
    console.print(table)


def _print_entries(kind: str) -> None:
    from rich.markup import escape
    from rich.padding import Padding

    from exitkit.cli.catalogue import GROUPS, entries, settings_of
    from exitkit.cli.terminal import Console

    console = Console(highlight=False)
    listed = entries(kind)
    if kind == "methods":
        order = list(GROUPS.values())
        listed = sorted(listed, key=lambda entry: (order.index(entry["group"]), entry["name"]))
    group = ""
    for entry in listed:
        if kind == "methods" and entry["group"] != group:
            group = entry["group"]
            console.rule(f"[bold]{group}", align="left")
        if entry.get("family"):
            continue  # presets are printed below their family
        _print_entry(console, kind, entry)
        usual = {name: default for name, _, default, _ in settings_of(entry)}
        for preset in listed:
            if preset.get("family") == entry["name"]:
                changes = ", ".join(f"{name} = {d}" for name, _, d, _ in settings_of(preset) if usual[name] != d)
                title = f"\n[bold cyan]{escape(preset['name'])}[/]  {escape(preset['summary'])}"
                console.print(Padding(title, (0, 0, 0, 2)))
                console.print(Padding(escape(changes or "the defaults above"), (0, 0, 0, 6)), style="dim")
        console.print()


def _print_entry(console: Console, kind: str, entry: Entry) -> None:
    """Print one entry with all its fields."""
    from rich.markup import escape
    from rich.padding import Padding

    from exitkit.cli.catalogue import settings_of

    console.print(f"[bold cyan]{escape(entry['name'])}[/]  {escape(entry['summary'])}")
    for line in _facts(kind, entry):
        console.print(Padding(escape(line), (0, 0, 0, 2)), style="dim")
    for name, values, default, meaning in settings_of(entry):
        console.print(f"  [bold]{escape(name)}[/] = {escape(default)}  [dim]{escape(values)}[/]")
        console.print(Padding(escape(meaning), (0, 0, 0, 6)))


def _facts(kind: str, entry: Entry) -> list[str]:
    if kind == "methods":
        return [entry["paper"], f"slots: {', '.join(entry['slots']) or 'none'}"]
    values = {"datasets": "house", "recipes": "values"}.get(kind)
    if values is None:
        return []
    return [", ".join(f"{key} {_short(value)}" for key, value in entry[values].items() if key != "title" and value)]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(f"{item:.3g}" if isinstance(item, float) else str(item) for item in value)
    return str(value)
