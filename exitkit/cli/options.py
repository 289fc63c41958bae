"""Options that several commands share, and the recipe made from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import folders, names, one_of, recipes, runs
from exitkit.errors import Note, UserError, unknown
from exitkit.files import exists

if TYPE_CHECKING:
    from exitkit.runs.recipe import Recipe

BASELINE = "joint"
DEFAULT_METHODS = "ge,boostnet,metagf"
"""What `exitkit compare` trains by default, besides the baseline."""
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
    "policy",
)
"""The keys of a comparison's recipe that a run's recipe does not have."""


def device_option(otherwise: str, default: str | None = None) -> Callable[..., Any]:
    """Return the option that selects the device; `otherwise` is the text of its help about the default."""
    devices = one_of("auto", "cpu", "cuda", "cuda:0", "mps")
    about = f"auto, cpu, cuda, cuda:N or mps.  {otherwise}"
    return click.option("--device", metavar="NAME", default=default, shell_complete=devices, help=about)


def json_option(what: str) -> Callable[..., Any]:
    """Return the option that makes a command print only JSON on standard output; `what` describes it in the help."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print JSON: {what}.")


classes_option = click.option("--classes", is_flag=True, help="Also show the recall of every class on test.")
"""The option of commands that show accuracies."""

data_dir_option = click.option(
    "--data-dir", metavar="DIR", shell_complete=folders, help="Current folder of the images.  [default: the run's]"
)
"""The option of commands that read the images of a run again."""

policy_option = click.option(
    "--policy",
    metavar="NAME",
    shell_complete=one_of(
        *("plain", "calibrated", "product", "caching", "geometric", "additive", "mean", "mie"),
        *("laplace", "mie-laplace"),
        *("confidence", "margin", "entropy", "patience"),
        *("shares", "agreement", "stopping", "fitted", "jei", "eenet"),
    ),
    help="Exit policy, by its name in `exitkit policies`: mie, margin+fitted, ...",
)
"""The option that selects an exit policy by its name."""

_TARGETS = [
    click.option("--latency", metavar="TIME", help="Mean time per image, such as 5ms, as `exitkit bench` measured it."),
    click.option("--latency-p95", metavar="TIME", help="Time that 95% of the images take at most, such as 5ms."),
    click.option("--lose", metavar="POINTS", type=float, help="Largest loss of accuracy against the full network."),
    click.option(
        "--certainty", metavar="SHARE", type=float, help="Guarantee --lose with this probability, such as 0.95."
    ),
    click.option("--accuracy", metavar="PERCENT", type=float, help="Smallest accuracy."),
    click.option("--at-most", is_flag=True, help="The budget is a bound: an upper confidence limit stays below it."),
]


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what an operating point must reach, besides --budget; see `targets`."""
    for option in reversed(_TARGETS):
        command = option(command)
    return command


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
        "--init-from", metavar="RUN", shell_complete=runs, help="Initial weights: a finished run or a weights file."
    ),
    click.option("--epochs", type=int, help="Number of epochs.  [default: the data set's]"),
    click.option("--batch-size", type=int, help="Images per step over all ranks.  [default: the data set's]"),
    click.option("--lr", type=float, help="Initial learning rate.  [default: the data set's]"),
    click.option("--probe-every", type=int, help="Epochs between measurements of a fixed batch, for `diagnose`."),
    device_option("[default: auto]"),
    click.option(
        "--precision",
        metavar="NAME",
        shell_complete=one_of("auto", "fp32", "tf32", "bf16", "fp16"),
        help="auto (bf16 where it is native), fp32, tf32, bf16 or fp16.  [default: fp32]",
    ),
    click.option(
        "--layout",
        metavar="NAME",
        shell_complete=one_of("auto", "contiguous", "channels-last"),
        help="Memory layout: auto, contiguous or channels-last (faster on CPUs; rounding differs).  [default: auto]",
    ),
    click.option("--threads", type=int, help="CPU threads per process; may change the last digits.  [default: 1]"),
    click.option(
        "--deterministic/--no-deterministic",
        default=None,
        help="Deterministic kernels on GPUs, or the fastest ones.  [default: deterministic]",
    ),
    click.option("--compile", is_flag=True, default=None, help="Compile the network with torch.compile, for GPUs."),
    click.option(
        "--data-dir",
        metavar="DIR",
        shell_complete=folders,
        help="Folder to read the images from, or to download them to.",
    ),
    click.option("--tensorboard", is_flag=True, default=None, help="Also write a TensorBoard log to the run folder."),
    click.option(
        "--set",
        "sets",
        metavar="FIELD=VALUE",
        multiple=True,
        help="Set a field of method, backbone or data set, or a key of training; repeatable.",
    ),
    click.option(
        "--recipe",
        "recipe_file",
        metavar="FILE",
        shell_complete=recipes,
        help="TOML file or recipe name (train: or run folder); options override it.",
    ),
    click.option(
        "--out",
        metavar="DIR",
        default="runs",
        show_default=True,
        shell_complete=folders,
        help="Folder to create run folders in.",
    ),
]


class FiniteFloat(click.FloatRange):
    """A number of an option, in a range; neither infinite nor NaN, which compares with nothing."""

    name = "number"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        """Return the number of a text."""
        number: float = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", parameter, context)
        return number


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a recipe to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_recipe(name: str | None) -> dict[str, Any]:
    """Return the values of a recipe (a file, a run folder or the name of an installed recipe); None: no values."""
    if name is None:
        return {}
    from exitkit.cli.catalogue import find_recipe
    from exitkit.runs.recipe import Recipe

    return Recipe.read(find_recipe(name))


def make_recipe(values: Mapping[str, Any], given: Mapping[str, Any]) -> Recipe:
    """Make a recipe from a file's values, overridden by options of the command line (None: not given).

    The settings of a method, network or data set that another one replaces are left out, with a `Note`.
    """
    from exitkit.runs.recipe import Recipe

    values = dict(values)
    for kind in ("method", "backbone", "dataset"):
        replaced, settings = values.get(kind), values.get(f"{kind}_settings")
        if settings and replaced and given.get(kind) not in (None, replaced):
            del values[f"{kind}_settings"]
            warnings.warn(Note(f"the recipe's settings of {replaced} are not used with {given[kind]}"), stacklevel=2)
    if given.get("init_from") is not None:  # the digest in a file is that of its own weights
        values.pop("init_weights", None)
    return Recipe.make(**(values | {key: value for key, value in given.items() if value is not None}))


def only_runs(names: list[str], expected: Collection[str] = ()) -> list[str]:
    """Drop paths that are not runs (`runs/*` also matches other files), unless no run remains.

    Args:
        names: paths.
        expected: patterns of the names of files that need not be reported.
    """
    others = [name for name in names if exists(Path(name)) and not Path(name, "recipe.json").is_file()]
    kept = [name for name in names if name not in others]
    if not any(exists(Path(name)) for name in kept):
        return names
    for name in others:
        if not any(fnmatch(Path(name).name, pattern) for pattern in expected):
            click.echo(f"skipped {name}: not a run folder", err=True)
    return kept


def some_of(option: str, word: str, text: str, known: Collection[str]) -> tuple[str, ...]:
    """Return the names in an option, which are separated by commas.

    Args:
        option: the option, for error messages.
        word: the kind of name, for error messages.
        text: the value of the option.
        known: all valid names.

    Raises:
        UserError: there is no name, or one is unknown.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"{option} is empty; expected some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown(word, name, known)
    return names


def parse_sets(sets: tuple[str, ...], option: str = "--set") -> dict[str, str]:
    """Return {field: value} of options of the form `field=value`.

    Raises:
        UserError: an option has no equals sign or no field, or a field is given twice.
    """
    pairs: dict[str, str] = {}
    for item in sets:
        field, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not field:
            raise UserError(f"{option} {item!r} is not of the form field=value, such as {option} temperature=0.5")
        if field in pairs:
            raise UserError(f"{option} gives {field!r} twice; expected each field once")
        pairs[field] = value
    return pairs
