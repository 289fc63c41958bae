"""The options that `train` and `compare` share, and the recipe that they make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import folders, names, one_of, recipes, runs
from exitkit.errors import UserError, unknown

if TYPE_CHECKING:
    from exitkit.runs.recipe import Recipe

COMPARISON_KEYS = (
    "title",
    "note",
    "methods",
    "seeds",
    "baseline",
    "set",
    "sweep",
    "static",
    "parts",
    "published",
    "figures",
    "report",
)
"""The keys that a recipe of a comparison has beyond those of a run."""


def device_option(otherwise: str, default: str | None = None) -> Callable[..., Any]:
    """Return the option that says where to compute; `otherwise` says in its help what counts if it is not given."""
    devices = one_of("auto", "cpu", "cuda", "cuda:0", "mps")
    about = f"auto, cpu, cuda, cuda:N or mps.  {otherwise}"
    return click.option("--device", metavar="NAME", default=default, shell_complete=devices, help=about)


def json_option(what: str) -> Callable[..., Any]:
    """Return the option that makes a command print JSON, and nothing else, on standard output."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print JSON: {what}.")


data_dir_option = click.option(
    "--data-dir", metavar="DIR", shell_complete=folders, help="Where the images lie now.  [default: where they did]"
)
"""Of commands that read a run's images again."""

_OPTIONS = [
    click.option(
        "--dataset",
        metavar="NAME",
        shell_complete=names("datasets"),
        help="Data set (see `exitkit list datasets`).  [default: digits]",
    ),
    click.option(
        "--backbone",
        metavar="NAME",
        shell_complete=names("backbones"),
        help="Network (see `exitkit list backbones`).  [default: the data set's]",
    ),
    click.option(
        "--init-from", metavar="RUN", shell_complete=runs, help="Start from a finished run, or from a weights file."
    ),
    click.option("--epochs", type=int, help="Epochs.  [default: the data set's]"),
    click.option("--batch-size", type=int, help="Images a step, over all ranks.  [default: the data set's]"),
    click.option("--lr", type=float, help="Learning rate at the start.  [default: the data set's]"),
    click.option("--probe-every", type=int, help="Look at a fixed batch every so many epochs, for `diagnose`."),
    device_option("[default: auto]"),
    click.option(
        "--precision",
        metavar="NAME",
        shell_complete=one_of("fp32", "tf32", "bf16", "fp16"),
        help="fp32, tf32, bf16 or fp16.  [default: fp32]",
    ),
    click.option("--threads", type=int, help="CPU threads a process.  [default: 1]"),
    click.option("--compile", is_flag=True, default=None, help="Compile the network first: worth it on a GPU."),
    click.option(
        "--data-dir", metavar="DIR", shell_complete=folders, help="Where the images lie, or are downloaded to."
    ),
    click.option(
        "--tensorboard", is_flag=True, default=None, help="Also write a TensorBoard log into the run's folder."
    ),
    click.option(
        "--set",
        "sets",
        metavar="FIELD=VALUE",
        multiple=True,
        help="Any field of method, backbone or data set; repeatable.",
    ),
    click.option(
        "--recipe",
        "recipe_file",
        metavar="FILE",
        shell_complete=recipes,
        help="TOML (or a run's recipe.json); options override it.",
    ),
    click.option(
        "--out",
        metavar="DIR",
        default="runs",
        show_default=True,
        shell_complete=folders,
        help="Where run folders go.",
    ),
]


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a recipe to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_recipe(name: str | None) -> dict[str, Any]:
    """Return the values of the recipe called `name` (a file, a run folder or a shipped recipe), or none."""
    if name is None:
        return {}
    from exitkit.cli.catalogue import find_recipe
    from exitkit.runs.recipe import Recipe

    return Recipe.read(find_recipe(name))


def make_recipe(values: Mapping[str, Any], given: Mapping[str, Any]) -> Recipe:
    """Make a recipe from a file's values and what the command line gives over them (None: not given)."""
    from exitkit.runs.recipe import Recipe

    return Recipe.make(**(dict(values) | {key: value for key, value in given.items() if value is not None}))


def some_of(option: str, word: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """Read an option's names, with commas between them.

    Raises:
        UserError: an unknown one (a `word` is what it would be), or none.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"{option} is empty; expected some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(word, name, known)
    return names


def parse_sets(sets: tuple[str, ...], option: str = "--set") -> dict[str, str]:
    """Read `field=value` pairs.

    Raises:
        UserError: one without an equals sign, or a field given twice.
    """
    pairs: dict[str, str] = {}
    for item in sets:
        field, equals, value = item.partition("=")
        if not equals or not field:
            raise UserError(f"{option} {item!r} is not of the form field=value, such as {option} temperature=0.5")
        if field in pairs:
            raise UserError(f"{option} gives {field!r} twice; once is enough")
        pairs[field.strip()] = value.strip()
    return pairs
