"""`exitkit recipes`: list, show, copy and check the recipes of the papers' tables and figures."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import click

from exitkit.cli.completion import names
from exitkit.cli.completion import recipes as complete_recipes
from exitkit.cli.options import json_option
from exitkit.errors import UserError
from exitkit.escaping import counted
from exitkit.files import exists, write_text


@click.group(short_help="List, copy and check recipes of comparisons.")
def recipes() -> None:
    """List, show, copy and check recipes.

    There is one recipe per table and figure of four papers, each with a small version named `-quick`, and further ones.

    \b
    Examples:
      exitkit recipes list
      exitkit recipes show imta-table2
      exitkit recipes copy imta-table2 mine.toml
      exitkit recipes validate mine.toml
      exitkit compare --recipe mine.toml
    """


@recipes.command("list", short_help="List all recipes.")
@json_option("an array of objects with name, summary and values")
def list_recipes(as_json: bool) -> None:
    """List the name and the title of every recipe.

    \b
    Example:
      exitkit recipes list
    """
    from rich.markup import escape
    from rich.table import Table

    from exitkit.cli.catalogue import entries
    from exitkit.cli.terminal import Console

    if as_json:
        click.echo(json.dumps(entries("recipes"), indent=2))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for entry in entries("recipes"):
        table.add_row(escape(entry["name"]), escape(entry["summary"]))
    Console().print(table)


@recipes.command("show", short_help="Print a recipe.")
@click.argument("name", metavar="NAME", shell_complete=names("recipes"))
def show_recipe(name: str) -> None:
    """Print the TOML file of a recipe.

    \b
    Example:
      exitkit recipes show imta-table2
    """
    click.echo(_text(name), nl=False)


@recipes.command("copy", short_help="Copy a recipe, to edit it.")
@click.argument("name", metavar="NAME", shell_complete=names("recipes"))
@click.argument("file", metavar="[FILE]", required=False)
def copy_recipe(name: str, file: str | None) -> None:
    """Copy a recipe to FILE (default: NAME.toml in the current folder), to edit it.

    \b
    Example:
      exitkit recipes copy imta-table2 mine.toml
    """
    target = Path(file or f"{name}.toml")
    text = _text(name)
    if exists(target):
        raise UserError(f"{target} already exists; choose another file")
    write_text(target, text)
    click.echo(f"wrote {target}; run it with: exitkit compare --recipe {target}")


@recipes.command("validate", short_help="Check a recipe.")
@click.argument("file", metavar="FILE", shell_complete=complete_recipes)
def validate_recipe(file: str) -> None:
    """Check every key and value of a recipe (a file or a recipe's name) without training.

    \b
    Example:
      exitkit recipes validate mine.toml
    """
    from exitkit.benchmarks.campaign.plan import Plan
    from exitkit.cli.options import read_recipe

    plan = Plan.make(read_recipe(file))
    if "toy" in plan.figures:
        click.echo(f"{file} is valid: it plots the toy problem of two exits")
        return
    runs = plan.runs()
    methods, networks, datasets = (
        list(dict.fromkeys(str(getattr(planned.recipe, kind)) for planned in runs))
        for kind in ("method", "backbone", "dataset")
    )
    what = f"{', '.join(methods)} on {', '.join(networks)} and {', '.join(datasets)}"
    text = f"{file} is valid: {counted(len(runs), 'run')} of {what}"
    click.echo(textwrap.fill(text, 110, subsequent_indent="  ", break_on_hyphens=False))


def _text(name: str) -> str:
    from exitkit.cli.catalogue import find_recipe

    try:
        return find_recipe(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe {name} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe {name} is not a text file; expected TOML") from None
