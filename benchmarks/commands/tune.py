"""`exitkit tune`: search for a method and its settings, and compare the winner with joint training on fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exitkit.cli.completion import names
from exitkit.cli.interrupts import interruptible
from exitkit.cli.options import BASELINE, FiniteFloat, parse_sets, read_recipe, recipe_options, some_of
from exitkit.errors import Interrupted, UserError
from exitkit.escaping import counted, printable
from exitkit.plugins import check_value

if TYPE_CHECKING:
    import optuna

    from exitkit.benchmarks.campaign.tuning import Space
    from exitkit.runs.folder import RunFolder
    from exitkit.runs.recipe import ResolvedRecipe


FINAL = "final"
CONFIDENCE = "confidence"
DEFAULT_METHODS = "joint,ge,boostnet"
_DEFAULT_RUNS = 20  # the default computation, in runs of the recipe's length


@click.command(short_help="Search for a method and its settings.")
@click.option(
    "--methods",
    metavar="A,B,...",
    shell_complete=names("methods"),
    help=f"Methods to search.  [default: the recipe's, or {DEFAULT_METHODS}]",
)
@click.option(
    "--space",
    "spaces",
    metavar="FIELD=LOW:HIGH[:log]",
    multiple=True,
    help="Range of a field, or FIELD=A,B,... ; FIELD may be METHOD.FIELD; repeatable.  [default: the methods' own "
    "ranges, and the learning rate from a tenth to three times the recipe's]",
)
@click.option(
    "--budget",
    metavar="SHARE",
    help="Maximise the accuracy at this average cost, such as 60% of the last exit's.  [default: the mean height of "
    "the budgeted curve]",
)
@click.option(
    "--policy",
    "policies",
    metavar="NAME",
    multiple=True,
    help="Exit policy to search, by its name in `exitkit policies`, besides confidence; repeatable.",
)
@click.option("--epochs-total", type=click.IntRange(1), help="Epochs of all runs together.  [default: 20 runs]")
@click.option("--hours", type=FiniteFloat(0, min_open=True), help="Hours that this process searches.")
@click.option("--seeds", type=click.IntRange(2), help="Fresh seeds of the comparison.  [default: the recipe's, or 3]")
@click.option("--seed", type=click.IntRange(0), help="Seed of the search.  [default: the recipe's, or 0]")
@recipe_options
def tune(
    methods: str | None,
    spaces: tuple[str, ...],
    budget: str | None,
    policies: tuple[str, ...],
    epochs_total: int | None,
    hours: float | None,
    seeds: int | None,
    seed: int | None,
    sets: tuple[str, ...],
    recipe_file: str | None,
    out: str,
    **given: Any,
) -> None:
    """Search methods and values of their fields for the best validation accuracy, and test the result on fresh seeds.

    Weak runs end early (successive halving). At the end, the best settings and joint training with its defaults are
    trained on seeds that the search did not use, and compared on the test images: the report is free of the search's
    optimism. With --policy, each run counts with its best policy on validation images, and the winner's policy is
    fitted anew on each of the fresh runs; joint training keeps the thresholds on confidence.

    The same command resumes the search, and several processes may share one folder. OUT/search has the runs, OUT/final
    the comparison, and `optuna-dashboard OUT/study.log` shows the study.

    \b
    Examples:
      exitkit tune --methods ge,boostnet --epochs-total 300
      exitkit tune --methods boostnet --space temperature=0:1 --budget 60%
      exitkit tune --methods ge,dfs --hours 8 --space lr=0.01:0.3:log
      exitkit tune --methods ge,boostnet --policy mie --policy mie+stopping
    """
    from exitkit.benchmarks.campaign.tuning import JOURNAL, Limits, Space, open_study, search
    from exitkit.benchmarks.report.policies import policies as named_policies
    from exitkit.cli.progress import loading

    with loading("torch"):
        import torch  # noqa: F401
    share = _share(budget)
    options = {key: value for key, value in given.items() if value is not None}
    recipe = _searchable(recipe_file)
    methods = methods or recipe.get("methods", DEFAULT_METHODS)
    wanted = some_of("--methods", "method", methods, _known(methods))
    seed = recipe.get("seed", 0) if seed is None else seed
    seeds = recipe.get("seeds", 3) if seeds is None else seeds
    values = {**recipe, **options, "set": {**recipe.get("set", {}), **parse_sets(sets)}}
    chosen = named_policies(names=policies) if policies else ()
    if embedded := [str(policy) for policy in chosen if policy.reads_embeddings]:
        raise UserError(
            f"--policy {embedded[0]} reads embeddings, which a search does not store; expected another policy"
        )
    space = Space.make(values, wanted, parse_sets(spaces, "--space"))
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder, or a new name")
    first = space.plan([{"name": wanted[0]}], wanted[0], seed, 1).runs()[0].recipe
    length = first.epochs
    if not (folder / JOURNAL).exists():
        _check_start(first, share, folder)
    limits = Limits(epochs_total or (None if hours else _DEFAULT_RUNS * length), hours)
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(folder, seed, max(length // 9, 1))
    try:
        with interruptible():
            search(study, space, folder, seed=seed, limits=limits, budget=share, tell=_tell, policies=chosen)
            entry, policy = _winner(study)
            _compare(space, entry, folder / FINAL, seed, seeds, policy, share)
    except KeyboardInterrupt:
        raise Interrupted("stopped; run the same command again to resume") from None


def _searchable(file: str | None) -> dict[str, Any]:
    """Return the values of a recipe, of which those of a comparison are such that a search can use them.

    Raises:
        UserError: a value would have no effect, or has the wrong type.
    """
    recipe = read_recipe(file)
    for key in ("parts", "sweep", "static", "figures"):
        if key in recipe:
            raise UserError(f"{file} has {key}, which a search does not use; expected a recipe without it")
    if recipe.get("baseline", BASELINE) != BASELINE:
        raise UserError(f"{file} has the baseline {recipe['baseline']}; a search compares its result with {BASELINE}")
    for key, kind in (("set", dict[str, Any]), ("seed", int), ("seeds", int)):
        if key in recipe:
            check_value(key, kind, recipe[key])
    if recipe.get("seeds", 2) < 2:
        raise UserError(f"{file} has seeds={recipe['seeds']}; expected at least 2 for a comparison")
    methods = recipe.get("methods", "")
    if isinstance(methods, list) and all(isinstance(name, str) for name in methods):
        recipe["methods"] = ",".join(methods)
    elif not isinstance(methods, str):
        raise UserError(f"{file} has methods with settings; expected names, whose settings are searched")
    return recipe


def _known(methods: str) -> set[str]:
    """Return the known methods, and the compositions in `methods`, whose parts are checked."""
    from exitkit import plugins

    compositions = {name.strip() for name in methods.split(",") if "+" in name}
    for name in compositions:
        plugins.method_parts(name)
    return {*plugins.names("method"), *compositions}


def _share(budget: str | None) -> float | None:
    if budget is None:
        return None
    try:
        share = float(budget.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not budget.endswith("%") or not 0 < share <= 1:
        raise UserError(f"--budget {budget} is no share of the last exit's cost; expected one such as 60%")
    return share


def _check_start(recipe: ResolvedRecipe, share: float | None, out: Path) -> None:
    """Check that the images can be read, and that the budget is not below the first exit's cost.

    Raises:
        UserError: one of both; each run of the search would fail by it.
    """
    from exitkit.benchmarks.campaign.estimate import Estimate

    costs = [exit.macs for exit in Estimate(out).costs(recipe)]
    if share is not None and share * costs[-1] < costs[0]:
        least = math.ceil(100 * costs[0] / costs[-1])
        raise UserError(f"--budget {100 * share:g}% is below the first exit's cost; expected at least {least}%")


def _tell(trial: optuna.trial.FrozenTrial) -> None:
    entry = trial.user_attrs.get("entry", {})
    result = {"COMPLETE": "finished", "PRUNED": "ended early", "FAIL": "failed"}.get(trial.state.name, trial.state.name)
    score = f"{trial.value:.2f}" if trial.value is not None else trial.user_attrs.get("reason", "")
    click.echo(f"run {trial.number}: {printable(_words(entry))}: {result} {score}".rstrip(), err=True)


def _words(entry: Mapping[str, Any]) -> str:
    fields = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items() if k != "name"]
    return " ".join([str(entry.get("name", "")), *fields])


def _winner(study: optuna.Study) -> tuple[dict[str, Any], str | None]:
    """Return the method and the settings of the best finished run, and its policy if policies were searched."""
    from optuna.trial import TrialState

    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        raise UserError("no run of the search finished; raise --epochs-total or --hours, or lower --epochs")
    best = max(finished, key=lambda trial: trial.value or 0.0)
    entry: dict[str, Any] = best.user_attrs["entry"]
    policy: str | None = best.user_attrs.get("policy")
    words = _words(entry) + (f" with {policy}" if policy else "")
    click.echo(f"best on validation: {printable(words)}: {best.value:.2f} ({counted(len(finished), 'run')} finished)")
    return entry, policy


def _compare(
    space: Space,
    entry: Mapping[str, Any],
    out: Path,
    seed: int,
    seeds: int,
    policy: str | None,
    budget: float | None,
) -> None:
    """Train the winner and joint training on fresh seeds, report both, and say whether the winner is better."""
    from exitkit.benchmarks.commands.compare import carry_out
    from exitkit.benchmarks.report import collect
    from exitkit.runs.folder import RunFolder

    plan = space.plan([{"name": BASELINE}, entry], BASELINE, seed + 1, seeds)
    runs = plan.runs()
    if len(runs) == seeds and policy in (None, CONFIDENCE):
        click.echo("nothing beat joint training with its default settings")
        return
    carry_out(plan, out)
    if policy is None and budget is None:
        click.echo(sentence(collect([RunFolder(out / run.recipe.id) for run in runs]).differences))
        return
    joint, winner = (
        [RunFolder(out / run.recipe.id) for run in space.plan([one], one["name"], seed + 1, seeds).runs()]
        for one in ({"name": BASELINE}, entry)
    )
    click.echo(sentence(policy_difference(joint, winner, policy or CONFIDENCE, budget), budget))


def policy_difference(
    joint: Sequence[RunFolder], winner: Sequence[RunFolder], policy: str, budget: float | None
) -> Any:
    """Return the difference on test images between the winner with its policy and joint training with confidence.

    Args:
        joint, winner: runs on the same seeds, in the same order.
        policy: the winner's policy.
        budget: see `tuning.policy_scores`.

    Returns:
        one row, as `sentence` reads it.
    """
    import pandas as pd

    from exitkit.benchmarks.campaign.tuning import policy_scores
    from exitkit.benchmarks.report.statistics import paired_difference
    from exitkit.inference.policy import read_policy

    ours, theirs = (
        [policy_scores(run, budget, [read_policy(name)])[0].test for run in runs]
        for runs, name in ((winner, policy), (joint, CONFIDENCE))
    )
    method = winner[0].recipe.method + (f" with {policy}" if policy != CONFIDENCE else "")
    return pd.DataFrame([{"method": method, "measure": "area", **paired_difference(ours, theirs)._asdict()}])


def sentence(differences: Any, budget: float | None = None) -> str:
    """Return in words whether the winner is better than joint training: by the area under the budgeted curve.

    Args:
        differences: rows of `measure`, of which "area" counts.
        budget: if given, the row is of the accuracy at this share of the last exit's cost.
    """
    rows = differences[differences["measure"] == "area"].to_dict("records")
    if not rows:
        return "no comparison with joint training: the budgeted curves of these runs share no range of costs"
    (row,) = rows
    measured = "of area" if budget is None else f"of accuracy at {100 * budget:g}%"
    limits = f"[{row['low']:+.2f}, {row['high']:+.2f}]"
    interval = f"{row['mean']:+.2f} points {measured} {limits}, {counted(row['n'], 'fresh seed')}"
    if row["low"] > 0:
        return f"{row['method']} beats joint training: {interval}"
    return f"nothing beat joint training: the best settings are not significantly better ({interval})"
