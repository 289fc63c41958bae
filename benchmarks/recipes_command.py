"""`exitkit recipes`: list the recipes of the papers' tables and figures, copy one to edit, check one."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from exitkit.errors import UserError
from exitkit.files import exists, write_text


@click.group(short_help="List, copy and check recipes of comparisons.")
def recipes() -> None:
    """List, copy and check recipes: one for every table and figure of the papers, with a `-quick` twin each.

    \b
    Examples:
      exitkit recipes list
      exitkit recipes show imta-table2
      exitkit recipes copy imta-table2 mine.toml
      exitkit recipes validate mine.toml
      exitkit compare --recipe mine.toml
    """


@recipes.command("list", short_help="Name all recipes.")
def list_recipes() -> None:
    """Name all recipes, with what each is."""
    from rich.console import Console
    from rich.table import Table

    from exitkit.catalogue import entries

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for entry in entries("recipes"):
        table.add_row(entry["name"], entry["summary"])
    Console().print(table)


@recipes.command("show", short_help="Print a recipe.")
@click.argument("name", metavar="NAME")
def show_recipe(name: str) -> None:
    """Print a recipe's file."""
    click.echo(_text(name), nl=False)


@recipes.command("copy", short_help="Copy a recipe, to edit it.")
@click.argument("name", metavar="NAME")
@click.argument("file", metavar="[FILE]", required=False)
def copy_recipe(name: str, file: str | None) -> None:
    """Copy a recipe into FILE (by default NAME.toml, here), to edit it."""
    target = Path(file or f"{name}.toml")
    text = _text(name)
    if exists(target):
        raise UserError(f"{target} is there already; name another file")
    write_text(target, text)
    click.echo(f"wrote {target}; run it with: exitkit compare --recipe {target}")


@recipes.command("validate", short_help="Check a recipe.")
@click.argument("file", metavar="FILE")
def validate_recipe(file: str) -> None:
    """Check a recipe (a file, or the name of a shipped one): every key and every value; nothing is run or loaded."""
    from exitkit.benchmarks.plan import Plan
    from exitkit.cli.options import read_recipe

    plan = Plan.make(read_recipe(file))
    if "toy" in plan.figures:
        click.echo(f"{file} is valid: it draws the toy problem of two exits")
        return
    runs = plan.runs()
    methods, networks, data = (
        list(dict.fromkeys(str(getattr(each.recipe, kind)) for each in runs))
        for kind in ("method", "backbone", "dataset")
    )
    told = f"{file} is valid: {len(runs)} runs of {', '.join(methods)} on {', '.join(networks)} and {', '.join(data)}"
    click.echo(textwrap.fill(told, 110, subsequent_indent="  ", break_on_hyphens=False))


def _text(name: str) -> str:
    from exitkit.catalogue import find_recipe

    try:
        return find_recipe(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe {name} can't be read: {error.strerror}") from None
