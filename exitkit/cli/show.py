"""`exitkit show`: prints one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import runs
from exitkit.cli.options import json_option
from exitkit.errors import UserError
from exitkit.files import exists

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from exitkit.runs.folder import RunFolder


@click.command(short_help="Show the settings and results of a run.")
@click.argument("run", metavar="RUN", shell_complete=runs)
@json_option("recipe, environment, and cost and accuracy of each exit")
def show(run: str, as_json: bool) -> None:
    """Show a run: its recipe, its state, and the cost and accuracy of each exit.

    \b
    Examples:
      exitkit show runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d
      exitkit show RUN --json
    """
    from exitkit.cli.catalogue import kind_of
    from exitkit.runs.folder import RunFolder

    if not exists(Path(run)) and (kind := kind_of(run)):
        raise UserError(f"run folder {run} does not exist; {run} is one of the {kind}: exitkit list {kind} {run}")
    folder = RunFolder(run)
    if as_json:
        click.echo(json.dumps(facts(folder), indent=2))
    else:
        print_run(folder)


def facts(run: RunFolder) -> dict[str, Any]:
    """Return the facts about a run that `show --json` prints."""
    exits: list[dict[str, Any]] = []
    if run.finished:
        results = run.results()
        accuracies = zip(run.costs(), results["test"], results["validation"], strict=True)
        exits = [cost | {"accuracy": test, "validation_accuracy": valid} for cost, test, valid in accuracies]
    return {
        "name": run.path.name,
        "path": str(run.path),
        "finished": run.finished,
        "epochs_done": run.epochs_done(),
        "recipe": run.recipe.model_dump(mode="json"),
        "environment": run.environment(),
        "exits": exits,
        "learned": run.learned(),
    }


def print_run(run: RunFolder, pictures: bool = True) -> None:
    """Print a run as text, with pictures of the values that its method learned besides the network."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    values = facts(run)
    recipe = values["recipe"]
    state = "finished" if run.finished else f"unfinished, {values['epochs_done']} epochs done"
    console.print(f"[bold cyan]{escape(values['name'])}[/]  {state}")
    about = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for kind in ("method", "backbone", "dataset"):
        settings = ", ".join(f"{key}={_short(value)}" for key, value in recipe[f"{kind}_settings"].items())
        about.add_row(kind, f"[bold]{escape(recipe[kind])}[/]  {escape(settings)}")
    about.add_row(
        "training",
        f"{recipe['epochs']} epochs, batch {recipe['batch_size']}, lr {recipe['lr']} ({recipe['schedule']}), "
        f"momentum {recipe['momentum']}, weight decay {recipe['weight_decay']}, {recipe['precision']}, "
        f"seed {recipe['seed']}",
    )
    console.print(about)
    if not values["exits"]:
        return
    table = Table()
    for heading in ("exit", "multiply-adds", "papers' count", "parameters", "validation %", "test %"):
        table.add_column(heading, justify="right")
    for row in values["exits"]:
        costs = [f"{row[key]:,}" for key in ("macs", "papers", "params")]
        table.add_row(str(row["exit"]), *costs, f"{row['validation_accuracy']:.2f}", f"{row['accuracy']:.2f}")
    console.print(table)
    if pictures:
        for learned in values["learned"]:
            _print_learned(console, learned)


def _print_learned(console: Console, learned: Mapping[str, Any]) -> None:
    """Print numbers between 0 and 1 as a picture; larger numbers have a brighter background."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    title = escape(f"{learned['title']} (phase {learned['phase']})")
    table = Table(box=None, padding=(0, 0), title=title, title_justify="left")
    table.add_column("", style="dim", overflow="ellipsis", no_wrap=True)
    for name in learned["columns"]:
        table.add_column(escape(f" {name} "), justify="right")
    for name, values in zip(learned["rows"], learned["values"], strict=True):
        fields = []
        for value in values:
            level = 0 if value is None else round(23 * min(max(value, 0.0), 1.0))
            style = "" if value is None else f"{'black' if level > 11 else 'white'} on color({232 + level})"
            fields.append(Text("" if value is None else f" {value:.2f} ", style=style, justify="center"))
        table.add_row(escape(name), *fields)
    console.print(table)


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
