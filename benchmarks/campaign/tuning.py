"""Search for a method and its settings: Optuna proposes, exitkit trains ordinary runs, weak ones end early.

A study is a journal file and a folder of runs. Any number of processes, on any machines that share the folder, may work
on it; a process that was killed loses one epoch.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import numpy as np

from exitkit import plugins
from exitkit.benchmarks.campaign.plan import Plan, without_unused
from exitkit.benchmarks.report.measure import RunMeasures
from exitkit.benchmarks.report.options import ReportOptions
from exitkit.benchmarks.report.policies import Outputs, measure
from exitkit.benchmarks.report.statistics import area_under_curve
from exitkit.errors import HeldError, UserError, unknown
from exitkit.inference.budgets import exit_costs
from exitkit.inference.operating_points import most_accurate_within
from exitkit.inference.policy import PolicyName
from exitkit.runs.folder import FEATURES, RunFolder
from exitkit.strategy.base import TrainingStrategy
from exitkit.strategy.composition import configure_strategy
from exitkit.training.loop import train
from exitkit.training.progress import Progress

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.log"
RUNS = "search"
RATES = (0.1, 3.0)
"""By default the learning rate is searched between these multiples of the recipe's."""
REDUCTION = 3
"""Successive halving continues one of REDUCTION runs at each rung."""
_STUDY = "exitkit"
_BUDGETS = 50  # over which the accuracy of a policy is averaged
_FRUITLESS = 20
"""Runs in a row that fail in their first epoch, after which a search ends: they spend no epochs, so it would not."""
_SHARED = ("lr", "batch_size", "weight_decay", "momentum", "epochs")
"""Fields of a recipe that may be searched with every method."""
_ABANDONED = 600.0  # seconds after which a trial of another machine, whose run nobody holds, counts as killed


@dataclass(frozen=True)
class Range:
    """The values that a field may take: a range of numbers, or choices."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def parse(cls, field: str, text: str) -> Range:
        """Parse `LOW:HIGH`, `LOW:HIGH:log` or `A,B,C`.

        Raises:
            UserError: the text has another form, or the range is empty.
        """
        parts = text.split(":")
        if len(parts) == 1:
            choices = tuple(value.strip() for value in text.split(",") if value.strip())
            if len(choices) < 2:
                raise UserError(f"--space {field}={text} has {len(choices)} values; expected LOW:HIGH[:log] or A,B,...")
            return cls(choices=choices)
        try:
            low, high = float(parts[0]), float(parts[1])
        except ValueError:
            raise UserError(f"--space {field}={text} is no range of numbers; expected LOW:HIGH[:log]") from None
        if len(parts) > 3 or parts[2:] not in ([], ["log"]):
            raise UserError(f"--space {field}={text} has {':'.join(parts[2:])!r} at its end; expected log or nothing")
        if not (low < high < float("inf") and low > float("-inf")) or (parts[2:] and low <= 0):
            raise UserError(f"--space {field}={text} is no range; expected LOW below HIGH, and above 0 with log")
        return cls(low, high, bool(parts[2:]))

    def suggest(self, trial: optuna.Trial, name: str, whole: bool) -> Any:
        """Return a value that Optuna proposes; `whole` asks for an integer."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        if whole:
            return trial.suggest_int(name, round(self.low), round(self.high), log=self.log)
        return _rounded(trial.suggest_float(name, self.low, self.high, log=self.log))


def _rounded(value: float) -> float:
    """Return a number with three digits, for short labels."""
    return float(f"{value:.3g}")


@dataclass(frozen=True)
class Space:
    """What a study searches.

    Attributes:
        values: values of the comparison's recipe that all runs share, see `Plan`.
        ranges: {method: {field of the method or of the recipe: range}}.
    """

    values: Mapping[str, Any]
    ranges: Mapping[str, Mapping[str, Range]]

    @classmethod
    def make(cls, values: Mapping[str, Any], methods: Sequence[str], spaces: Mapping[str, str]) -> Space:
        """Return the default space of some methods, changed by `spaces`.

        By default, a method's fields are searched that declare a range (`setting(search=...)`), and the learning rate;
        but not a field of the key `set` of the values.

        Args:
            values: see `Space`.
            methods: names of methods.
            spaces: {`FIELD` or `METHOD.FIELD`: text of a range}; see `_named` for the fields of compositions.

        Raises:
            UserError: a method or field is unknown, or a range or a choice is invalid.
        """
        base = Plan.make({**values, "methods": [methods[0]], "baseline": methods[0], "seeds": 1}).runs()[0].recipe
        low, high = (_rounded(base.lr * factor) for factor in RATES)
        lr = Range(low, high, log=True)
        ranges: dict[str, dict[str, Range]] = {}
        used: set[str] = set()
        for method in methods:
            settable = {*_fields(method), *_SHARED}
            fixed = {name for name in settable if {name, f"{method}.{name}"} & {*values.get("set", {})}}
            searched = {"lr": lr} | default_ranges(method)
            ranges[method] = {name: each for name, each in searched.items() if name not in fixed}
            for key, text in spaces.items():
                owner, _, last = key.rpartition(".")
                name = last if owner == method else key
                if name in settable:
                    if name in fixed:
                        raise UserError(f"{key} is given by --set and by --space; expected one of them")
                    ranges[method][name] = Range.parse(key, text)
                    _check_values(values, method, name, f"--space {key}={text}", ranges[method][name])
                    used.add(key)
        for key in spaces.keys() - used:
            known = {name for method in methods for name in _fields(method)} | {*_SHARED}
            raise unknown(f"field of {', '.join(methods)}", key, known)
        return cls(values, ranges)

    def propose(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return the entry of a method with values of its fields, as Optuna proposes them."""
        names = list(self.ranges)
        method = str(trial.suggest_categorical("method", names)) if len(names) > 1 else names[0]
        entry: dict[str, Any] = {"name": method}
        for field, searched in self.ranges[method].items():
            entry[field] = searched.suggest(trial, f"{method}.{field}", _is_whole(method, field))
        return self._effective(entry)

    def _effective(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of an entry that have an effect; all if a value is refused, run by run."""
        method = str(entry["name"])
        own = {key.removeprefix(f"{method}."): value for key, value in self.values.get("set", {}).items()}
        settings = {name: value for name, value in (own | dict(entry)).items() if name in _fields(method)}
        try:
            unused = configure_strategy(method, settings).unused_settings()
        except UserError:
            return dict(entry)
        return without_unused(entry, unused)

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Return {name in Optuna: choices} of what `propose` asks for; () for a range of numbers."""
        named: dict[str, tuple[Any, ...]] = {"method": tuple(self.ranges)} if len(self.ranges) > 1 else {}
        for method, ranges in self.ranges.items():
            named |= {f"{method}.{field}": searched.choices for field, searched in ranges.items()}
        return named

    def plan(self, entries: Sequence[Mapping[str, Any]], baseline: str, seed: int, seeds: int) -> Plan:
        """Return the plan that trains some methods with given values of their fields."""
        methods = [self._effective(entry) for entry in entries]
        return Plan.make({**self.values, "methods": methods, "baseline": baseline, "seed": seed, "seeds": seeds})


def _is_whole(method: str, field: str) -> bool:
    """Whether a field has integers."""
    return field in ("epochs", "batch_size") or isinstance(_fields(method).get(field), int)


def _check_values(values: Mapping[str, Any], method: str, field: str, option: str, searched: Range) -> None:
    """Check the type of the values of a field, and for fields of the recipe their range as well.

    A range of numbers is checked near its ends, which may be excluded (a learning rate from 0). A method's own ranges
    may depend on its other fields: what they refuse is refused run by run.

    Raises:
        UserError: a value is impossible.
    """
    inside = (searched.low + share * (searched.high - searched.low) for share in (0.01, 0.99))
    tried: list[Any] = [*searched.choices] or [
        round(value) if _is_whole(method, field) else _rounded(value) for value in inside
    ]
    named = _named(method)
    for value in tried:
        try:
            if field in named:
                part, own = named[field]
                plugins.check_value(own, get_type_hints(plugins.underlying(plugins.load("method", part)))[own], value)
            else:
                entry = {"name": method, field: value}
                Plan.make({**values, "methods": [entry], "baseline": method, "seeds": 1}).runs()
        except UserError as error:
            raise UserError(f"{option} can't be searched: {error}") from None


def default_ranges(method: str) -> dict[str, Range]:
    """Return the ranges that the fields of a method, or of the parts of a composition, declare."""
    ranges: dict[str, Range] = {}
    for name, (part, field) in _named(method).items():
        declared = plugins.fields(plugins.load("method", part))[field].metadata.get("search")
        if declared:
            ranges[name] = Range(declared[0], declared[1], "log" in declared[2:])
    return ranges


def _named(method: str) -> dict[str, tuple[str, str]]:
    """Return {name: (part, field)} of the fields of a method, or of the parts of a composition.

    The name of a field that several parts have is `PART.FIELD`, unless it is a field of every method.
    """
    fields = {part: plugins.fields(plugins.load("method", part)) for part in plugins.method_parts(method)}
    owners = Counter(field for own in fields.values() for field in own)
    common = plugins.fields(TrainingStrategy)
    return {
        f"{part}.{field}" if owners[field] > 1 and field not in common else field: (part, field)
        for part, own in fields.items()
        for field in own
    }


def _fields(method: str) -> dict[str, Any]:
    """Return {name: default} of the fields of a method, or of the parts of a composition; see `_named`."""
    defaults = {part: plugins.defaults(plugins.load("method", part)) for part in plugins.method_parts(method)}
    return {name: defaults[part][field] for name, (part, field) in _named(method).items()}


def objective(run: RunFolder, budget: float | None) -> float:
    """Return what a study maximises, on validation, in percent.

    Args:
        run: a finished run.
        budget: share of the last exit's cost, at which the accuracy counts; None: the mean height of the budgeted
            curve between the costs of the first and the last exit.
    """
    measures = RunMeasures(run, ReportOptions())
    costs = exit_costs(run, "macs")
    if budget is not None:
        return float(measures.budgeted(costs[-1:] * budget).validation_accuracy[0])
    curve = measures.curve
    low, high = curve.validation_cost.min(), curve.validation_cost.max()
    return area_under_curve(curve.validation_cost, curve.validation_accuracy, low, high)


class Scored(NamedTuple):
    """A policy on one run: its accuracy in percent, cross-fitted on validation images, and on test images."""

    policy: PolicyName
    validation: float
    test: float


def policy_scores(run: RunFolder, budget: float | None, policies: Sequence[PolicyName]) -> list[Scored]:
    """Return how accurate policies are on the stored outputs of a run.

    Args:
        run: a finished run.
        budget: share of the last exit's cost; None: the mean over budgets from the first exit's cost to the last one's.
        policies: the policies. Where one has no operating point within a budget, all images leave at the first exit.
    """
    validation, test = ((part["logits"], part["labels"]) for part in map(run.outputs, ("validation", "test")))
    costs = np.asarray(exit_costs(run, "macs"), dtype=np.float64)
    budgets = np.linspace(costs[0], costs[-1], _BUDGETS) if budget is None else costs[-1:] * budget
    first = [float((logits[:, 0].argmax(1) == labels).mean()) for logits, labels in (validation, test)]
    scored = []
    for found in measure(Outputs(validation, test, costs), policies):
        points = most_accurate_within(found.validation_cost, found.validation_accuracy, budgets)
        within = found.validation_cost[points] <= budgets
        parts = zip((found.validation_accuracy, found.accuracy), first, strict=True)
        means = [100 * float(np.where(within, values[points], least).mean()) for values, least in parts]
        scored.append(Scored(found.policy, *means))
    return scored


@dataclass(frozen=True)
class Limits:
    """When a search ends: after `epochs` epochs over all trials, or `hours` of this process."""

    epochs: int | None = None
    hours: float | None = None

    def reached(self, trained: int, began: float) -> bool:
        """Whether a limit is reached, with `trained` epochs and a process that began at `began` (monotonic)."""
        return self.late(began) or (self.epochs is not None and trained >= self.epochs)

    def late(self, began: float) -> bool:
        """Whether the hours of a process that began at `began` (monotonic) are over."""
        return self.hours is not None and time.monotonic() - began >= 3600 * self.hours


def open_study(out: Path, seed: int, rungs: int) -> optuna.Study:
    """Open or make the study of a folder.

    Args:
        out: the folder.
        seed: seed of the proposals; each process adds its number.
        rungs: the epoch of the first rung of successive halving.

    Raises:
        UserError: Optuna is not installed, or the journal is damaged.
    """
    try:
        # Optional: the extra `tune`.
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise UserError("tune needs Optuna; install it with: pip install 'exitkit[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
        sampler = optuna.samplers.TPESampler(seed=(seed + os.getpid() % 1000) % 2**32)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs, reduction_factor=REDUCTION)
        try:  # loading alone leaves the journal as it is
            return optuna.load_study(study_name=_STUDY, storage=storage, sampler=sampler, pruner=pruner)
        except KeyError:
            return optuna.create_study(
                study_name=_STUDY,
                storage=storage,
                sampler=sampler,
                pruner=pruner,
                direction="maximize",
                load_if_exists=True,  # another process may have made it by now
            )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / JOURNAL} is damaged ({error}); expected the journal of a study") from None


def trained_epochs(study: optuna.Study) -> int:
    """Return the number of epochs of all trials."""
    return sum(len(trial.intermediate_values) for trial in study.get_trials(deepcopy=False))


def search(
    study: optuna.Study,
    space: Space,
    out: Path,
    *,
    seed: int,
    limits: Limits,
    budget: float | None,
    tell: Callable[[optuna.trial.FrozenTrial], None],
    policies: Sequence[PolicyName] = (),
) -> None:
    """Train trials until a limit is reached, but at least one, and those that a killed process began.

    The search also ends if many trials in a row train nothing, because their runs are finished: the space is small.

    Args:
        study, space: what is searched.
        out: the folder of the study.
        seed: of the runs.
        limits: when the search ends.
        budget: see `objective`.
        tell: called after each trial.
        policies: each run counts with the best of them on validation (`policy_scores`); empty: see `objective`.

    Raises:
        UserError: the trials of the study chose among other methods or values, or run after run fails at once.
    """
    import optuna  # optional: the extra `tune`

    began, idle, fruitless = time.monotonic(), 0, 0
    _check_same(study, space, out)
    if not limits.late(began):
        _requeue(study, out)
    while not limits.reached(trained_epochs(study), began) or _unfinished(study, not limits.late(began)):
        trial = study.ask()
        try:
            entry = space.propose(trial)
            recipe = space.plan([entry], entry["name"], seed, 1).runs()[0].recipe
            for key, value in {"run": recipe.id, "host": platform.node(), "pid": os.getpid(), "entry": entry}.items():
                trial.set_user_attr(key, value)
            run = train(recipe, out / RUNS, report=_pruning(trial, out / RUNS / recipe.id))
            if not policies:
                _tell(study, trial, objective(run, budget))
            else:
                best = max(policy_scores(run, budget, policies), key=lambda scored: scored.validation)
                trial.set_user_attr("policy", str(best.policy))
                _tell(study, trial, best.validation)
        except optuna.TrialPruned:
            shutil.rmtree(out / RUNS / recipe.id / FEATURES, ignore_errors=True)  # they may be large
            _tell(study, trial, state=optuna.trial.TrialState.PRUNED)
        except HeldError:  # another process trains this run: neither idle nor a failure
            _tell(study, trial, state=optuna.trial.TrialState.FAIL)
            continue
        except UserError as error:  # diverged, or not a valid combination: the search goes on
            trial.set_user_attr("reason", str(error))
            _tell(study, trial, state=optuna.trial.TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # another process took this one for dead, has ended the trial, and trains its run
        told = study.get_trials(deepcopy=False)[trial.number]
        tell(told)
        idle = 0 if told.intermediate_values else idle + 1
        fruitless = fruitless + 1 if idle and told.state == optuna.trial.TrialState.FAIL else 0
        if fruitless == _FRUITLESS:
            reason = told.user_attrs.get("reason", "their process ended")
            raise UserError(f"the last {fruitless} runs of the search failed in their first epoch: {reason}")
        if idle == _FRUITLESS:
            break


def _tell(study: optuna.Study, trial: optuna.Trial | int, value: float | None = None, **state: Any) -> None:
    """Record the result of a trial, unless another process took this one for dead and has ended it."""
    study.tell(trial, value, skip_if_finished=True, **state)


def _check_same(study: optuna.Study, space: Space, out: Path) -> None:
    """Check that a study has chosen among the values of a space so far; Optuna lets only ranges of numbers change."""
    earlier = {name: each for trial in study.get_trials(deepcopy=False) for name, each in trial.distributions.items()}
    for name, choices in space.choices().items():
        if name in earlier and (before := getattr(earlier[name], "choices", ())) != choices:
            among = f"among {', '.join(map(str, before))}" if before else "in a range"
            raise UserError(
                f"the study of {out} searches {name} {among}; expected the same --methods and --space, or another --out"
            )


def _pruning(trial: optuna.Trial, path: Path) -> Callable[[Progress], None]:
    """Return the function that reports each epoch's validation accuracy (mean over exits), and ends weak runs."""
    import optuna  # optional: the extra `tune`

    def report(progress: Progress) -> None:
        if not progress.epoch_done or progress.phase.startswith("teacher "):
            return
        metrics = RunFolder(path).metrics()
        accuracy = metrics.filter(regex=r"^validation_accuracy_").iloc[-1].mean()
        trial.report(float(accuracy), step=len(metrics))
        if trial.should_prune():
            raise optuna.TrialPruned

    return report


def _unfinished(study: optuna.Study, in_time: bool) -> bool:
    """Whether a study has no trial yet, or, `in_time`, one that a killed process began and that is queued again."""
    import optuna  # optional: the extra `tune`

    states = {trial.state for trial in study.get_trials(deepcopy=False)}
    return not states or (in_time and optuna.trial.TrialState.WAITING in states)


def _requeue(study: optuna.Study, out: Path) -> None:
    """Queue the trials of killed processes again; their runs are resumed."""
    import optuna  # optional: the extra `tune`

    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        if _alive(trial, out):
            continue
        _tell(study, trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params)


def _alive(trial: optuna.trial.FrozenTrial, out: Path) -> bool:
    """Whether the process of a running trial may still be there."""
    name = trial.user_attrs.get("run")
    if name and RunFolder.is_held(out / RUNS / name):
        return True
    if trial.user_attrs.get("host") == platform.node():
        process = trial.user_attrs["pid"]
        if process == os.getpid():  # a new process has the number of the dead one
            return False
        try:
            os.kill(int(process), 0)
        except PermissionError:  # it is another user's
            return True
        except (OSError, ValueError):
            return False
        return True
    age = time.time() - trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return age < _ABANDONED
