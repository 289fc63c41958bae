"""`exitkit show`: prints one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import runs as complete_runs
from exitkit.cli.options import classes_option, json_option, only_runs
from exitkit.errors import UserError
from exitkit.escaping import counted
from exitkit.files import exists

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.box import Box

    from exitkit.cli.terminal import Console
    from exitkit.runs.folder import RunFolder


@click.command(short_help="Show the settings and results of runs.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_runs)
@classes_option
@json_option("recipe, environment, and cost and accuracy of each exit; of several runs, a list")
def show(runs: tuple[str, ...], classes: bool, as_json: bool) -> None:
    """Show runs: their recipe, their state, and the cost and accuracy of each exit.

    "balanced" is the mean recall of the classes on test.

    \b
    Examples:
      exitkit show runs/boostnet-msdnet-tiny-digits-s0-1a2b3c4d
      exitkit show runs/* --classes
      exitkit show RUN --json
    """
    from exitkit.cli.catalogue import kind_of
    from exitkit.runs.folder import RunFolder

    for run in runs:
        if not exists(Path(run)) and (kind := kind_of(run)):
            raise UserError(f"run folder {run} does not exist; {run} is one of the {kind}: exitkit list {kind} {run}")
    folders = [RunFolder(run) for run in only_runs(list(dict.fromkeys(runs)))]
    if as_json:
        shown = [facts(folder, classes) for folder in folders]
        click.echo(json.dumps(shown if len(runs) > 1 else shown[0], indent=2))
    else:
        for folder in folders:
            print_run(folder, classes=classes)


def facts(run: RunFolder, classes: bool = False) -> dict[str, Any]:
    """Return the facts about a run that `show --json` prints; with `classes`, also the recall of every class."""
    values = {
        "name": run.path.name,
        "path": str(run.path),
        "finished": run.finished,
        "epochs_done": run.epochs_done(),
        "recipe": run.recipe.model_dump(mode="json"),
        "environment": run.environment(),
        "exits": [],
        "learned": run.learned(),
    }
    if not run.finished:
        return values
    results, counted, names = run.results(), run.classes("test"), run.class_names()
    values["exits"] = [
        cost | {"accuracy": test, "validation_accuracy": valid, "balanced_accuracy": float(balanced)}
        for cost, test, valid, balanced in zip(
            run.costs(), results["test"], results["validation"], counted.balanced, strict=True
        )
    ]
    values["most_frequent_class"] = {"name": names[counted.most_frequent], "accuracy": counted.majority}
    values["chance"] = counted.chance
    values["no_better_than_chance"] = [number for number, good in enumerate(counted.learned, 1) if not good]
    values["left_out"] = results.get("left_out", {})
    if classes:
        recall = counted.recall.T
        rows = zip(names, counted.images.tolist(), recall.tolist(), strict=True)
        values["classes"] = [{"class": name, "images": images, "recall": some} for name, images, some in rows if images]
    return values


def print_run(run: RunFolder, pictures: bool = True, classes: bool = False) -> None:
    """Print a run as text.

    Args:
        run: the run.
        pictures: also print pictures of the values that its method learned besides the network.
        classes: also print the recall of every class.
    """
    from exitkit.cli.terminal import Console

    console = Console(highlight=False)
    values = facts(run, classes)
    _print_settings(console, values)
    if not values["exits"]:
        return
    _print_exits(console, values)
    if classes:
        _print_classes(console, values["classes"])
    if pictures:
        for learned in values["learned"]:
            _print_learned(console, learned)


def _print_settings(console: Console, values: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from exitkit.runs.recipe import FINE_TUNING, Recipe

    recipe = values["recipe"]
    state = "finished" if values["finished"] else f"unfinished, {counted(values['epochs_done'], 'epoch')} done"
    console.print(f"[bold cyan]{escape(values['name'])}[/]  {state}")
    about = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for kind in ("method", "backbone", "dataset"):
        settings = ", ".join(f"{key}={_short(value)}" for key, value in recipe[f"{kind}_settings"].items())
        about.add_row(kind, f"[bold]{escape(recipe[kind])}[/]  {escape(settings)}")
    about.add_row(
        "training",
        f"{counted(recipe['epochs'], 'epoch')}, batch {recipe['batch_size']}, "
        f"lr {recipe['lr']} ({recipe['schedule']}), momentum {recipe['momentum']}, "
        f"weight decay {recipe['weight_decay']}, {recipe['precision']}, seed {recipe['seed']}",
    )
    if tuning := [f"{key}={recipe[key]}" for key in FINE_TUNING if recipe[key] != Recipe.model_fields[key].default]:
        about.add_row("fine-tuning", ", ".join(tuning))
    console.print(about)


def _print_exits(console: Console, values: Mapping[str, Any]) -> None:
    """Print the table of the exits, and what its accuracies are to be compared with."""
    from rich.table import Table
    from rich.text import Text

    from exitkit.runs.formats import left_out

    table = Table(box=_lines(), padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("exit", "multiply-adds", "papers' count", "parameters", "val %", "test %", "balanced %"):
        table.add_column(heading, justify="right")
    for row in values["exits"]:
        costs = [f"{row[key]:,}" for key in ("macs", "papers", "params")]
        scores = [f"{row[key]:.2f}" for key in ("validation_accuracy", "accuracy", "balanced_accuracy")]
        table.add_row(str(row["exit"]), *costs, *scores)
    console.print(table)
    frequent = values["most_frequent_class"]
    always = f"test {frequent['accuracy']:.2f} %, balanced {values['chance']:.2f} %"
    console.print(Text(f" always answering {frequent['name']}: {always}", style="dim"))
    numbers = values["no_better_than_chance"]
    if numbers:
        listed = f"exit{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
        verb = "are" if len(numbers) > 1 else "is"
        console.print(Text(f" {listed} {verb} no better than chance (balanced accuracy)", style="yellow"))
    for part, messages in values["left_out"].items():
        console.print(Text(f" evaluated {left_out(part, messages)}", style="yellow"))


def _print_classes(console: Console, classes: Sequence[Mapping[str, Any]]) -> None:
    """Print the recall of every class, those with the lowest recall at the last exit first."""
    from rich.table import Table
    from rich.text import Text

    console.print("[bold]recall on test (%)")
    table = Table(box=_lines(), padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("class", overflow="fold")
    for heading in ("images", *(f"exit {number}" for number in range(1, len(classes[0]["recall"]) + 1))):
        table.add_column(heading, justify="right")
    for row in sorted(classes, key=lambda row: row["recall"][-1]):
        table.add_row(Text(row["class"]), f"{row['images']:,}", *(f"{value:.1f}" for value in row["recall"]))
    console.print(table)


def _lines() -> Box:
    from rich import box

    return box.SIMPLE_HEAD


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
