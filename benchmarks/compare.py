"""`exitkit compare`: several methods, several seeds, one recipe; tables and curves at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.interrupts import interruptible
from exitkit.cli.options import COMPARISON_KEYS, make_recipe, parse_sets, read_recipe, recipe_options
from exitkit.errors import Interrupted, UserError, unknown
from exitkit.files import exists
from exitkit.plugins import check_value, configure

if TYPE_CHECKING:
    from exitkit.recipe import Recipe

BASELINE = "joint"
DEFAULT_METHODS = "ge,boostnet,metagf"


@click.command(short_help="Train several methods and print their tables.")
@click.option("--methods", metavar="A,B,...", help=f"Methods, or all.  [default: {DEFAULT_METHODS}]")
@click.option("--seeds", type=int, help="How many seeds each.  [default: 2]")
@click.option("--seed", type=int, help="The first seed.  [default: 0]")
@click.option("--jobs", type=int, help="Runs at once.  [default: one a core, or one a GPU]")
@click.option("--resume", is_flag=True, help="What compare always does: skip what is finished, go on with the rest.")
@recipe_options
def compare(
    methods: str | None,
    seeds: int | None,
    jobs: int | None,
    resume: bool,
    sets: tuple[str, ...],
    recipe_file: str | None,
    out: str,
    **given: Any,
) -> None:
    """Train several methods side by side, joint training always among them, and print accuracy against cost.

    Started again, it skips what is finished and goes on with what is not. Tables (CSV, Markdown, LaTeX) and curves
    (PNG, PDF) go into OUT/report.

    \b
    Examples:
      exitkit compare --methods ge,boostnet,metagf
      exitkit compare --methods boostnet,metagf --seeds 5 --epochs 60 --out study
      exitkit compare --methods ge --dataset cifar100 --data-dir data --device cuda
    """
    values = read_recipe(recipe_file)
    # What a recipe of a comparison has beyond one of a run.
    asked = {key: values.pop(key) for key in COMPARISON_KEYS if key in values}
    listed = check_value("methods", list[str] | str, asked.get("methods", DEFAULT_METHODS))
    names = split_methods(listed if methods is None else methods)
    count = check_value("seeds", int, asked.get("seeds", 2)) if seeds is None else seeds
    recipes = plan(make_recipe(values, given), names, count, parse_sets(sets))

    from exitkit.benchmarks.campaign import default_jobs, run_campaign
    from exitkit.benchmarks.campaign_display import CampaignDisplay
    from exitkit.runs import RESULTS

    workers = default_jobs(recipes[0].device, recipes[0].threads) if jobs is None else jobs
    if workers < 1:
        raise UserError(f"--jobs is {workers}; expected at least 1")
    folder = Path(out)
    needed = {recipe.id: recipe for recipe in [*recipes, *_teachers(recipes)]}
    todo = [recipe for recipe in needed.values() if not exists(folder / recipe.id / RESULTS)]
    diverged: dict[int, str] = {}
    try:
        with interruptible(), CampaignDisplay(todo, len(needed)) as display:
            diverged = run_campaign(todo, folder, workers, display) if todo else {}
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on where it was") from None
    left_out = "; ".join(f"left out {todo[index].id}: {reason}" for index, reason in diverged.items())
    if len(diverged) < len(recipes):
        publish(recipes, folder)
    if left_out:
        raise UserError(left_out)


def _teachers(recipes: list[Recipe]) -> list[Recipe]:
    """Return the recipes of the runs that some of these learn from."""
    from exitkit.ingredients import teacher_recipes

    return [teacher for recipe in recipes for teacher in teacher_recipes(recipe).values()]


def split_methods(methods: str | list[str]) -> list[str]:
    """Return the methods named, each once, with the baseline first."""
    from exitkit.build import method_parts
    from exitkit.plugins import registered

    names = methods if isinstance(methods, list) else methods.split(",")
    names = [name.strip() for name in names if str(name).strip()]
    if not names:
        raise UserError(f"--methods is empty; expected names such as {DEFAULT_METHODS}, or all")
    if names == ["all"]:
        names = usable(list(registered("method")))
    for name in names:
        method_parts(name)
    return list(dict.fromkeys([BASELINE, *names]))


def usable(names: list[str]) -> list[str]:
    """Return the methods that can be had here, and say which can't and why."""
    usable = []
    for name in names:
        try:
            configure("method", name, {})
        except UserError as error:
            click.echo(f"left out {name}: {error}", err=True)
        else:
            usable.append(name)
    return usable


def plan(base: Recipe, methods: list[str], seeds: int, sets: Mapping[str, Any]) -> list[Recipe]:
    """Return the resolved recipes of all runs, method by method; a field is set in every method that has it.

    Raises:
        UserError: anything wrong with any of them, a field that no method has, or fewer than one seed.
    """
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; expected at least 1")
    recipes = []
    used: set[str] = set()
    known: set[str] = set()
    for method in methods:
        recipe = base.with_values(method=method)
        settable = recipe.settable()
        known |= settable
        mine = {key: value for key, value in sets.items() if key in settable}
        # `boostnet.temperature` says which method is meant.
        prefixed = {k: v for k, v in sets.items() if k.startswith(f"{method}.") and k.split(".", 1)[1] in settable}
        used |= mine.keys() | prefixed.keys()
        mine |= {key.split(".", 1)[1]: value for key, value in prefixed.items()}
        for seed in range(base.seed, base.seed + seeds):
            recipes.append(recipe.with_values(seed=seed).with_settings(mine).resolve())
    for key in sets:
        if key not in used:
            raise unknown(f"field of {', '.join(methods)} or their network and data", key, known)
    return recipes


def publish(recipes: list[Recipe], out: Path) -> None:
    """Write and print the report of those runs that are finished."""
    from rich.console import Console

    from exitkit.benchmarks.report import collect, print_report, write_report
    from exitkit.runs import RESULTS, RunFolder

    runs = [RunFolder(out / recipe.id) for recipe in recipes if exists(out / recipe.id / RESULTS)]
    comparison = collect(runs)
    write_report(comparison, out / "report")
    print_report(comparison, Console())
    click.echo(f"tables and figures: {out / 'report'}")
