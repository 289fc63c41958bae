"""What made a report: the commands, and the versions, hardware and time of its runs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from exitkit.benchmarks.published.defaults import default_fields
from exitkit.benchmarks.report.comparison import Comparison, Context
from exitkit.benchmarks.report.labels import as_text
from exitkit.errors import DamagedError
from exitkit.escaping import counted

if TYPE_CHECKING:
    from exitkit.runs.folder import RunFolder


def provenance(comparison: Comparison, runs: Iterable[RunFolder]) -> list[tuple[str, str]]:
    """Return (name, text) of each fact about how the runs were made; empty without runs."""
    used = [run for run in runs if run.path.name in comparison.names]
    known, unknown = [], []
    for run in used:
        try:
            run.environment()
            known.append(run)
        except DamagedError as error:  # no number of the report needs this record
            unknown.append(str(error))
    facts = commands(comparison.context, used)
    facts += [("hardware", hardware(known)), ("versions", versions(known))] if known else []
    facts += [("not recorded", text) for text in unknown]
    return [*facts, ("runs", _runs(known, len(used)))] if used else []


def commands(context: Context, runs: Iterable[RunFolder]) -> list[tuple[str, str]]:
    """Return (name, command line) of the comparisons, and of every run that none of them planned.

    Runs that differ in the seed only share one command, whose name lists the seeds.
    """
    seeds: dict[str, list[int]] = {}
    for run in runs:
        if run.path.name not in context.stands_for:
            seeds.setdefault(_train_command(run), []).append(run.recipe.seed)
    facts = [("command", line) for line in context.commands]
    for line, some in seeds.items():
        if len(some) == 1:
            facts.append(("command", f"{line} --seed {some[0]}"))
        else:
            facts.append((f"command (SEED is {', '.join(map(str, sorted(some)))})", f"{line} --seed SEED"))
    return facts


_OPTIONS = ("method", "backbone", "dataset", "epochs", "batch_size", "lr", "probe_every", "precision", "layout")
_ALWAYS = _OPTIONS[:6]  # values without which a command would be hard to read
_SET_BY_EXITKIT = ("seed", "init_weights", "ingredients")


def _train_command(run: RunFolder) -> str:
    """Return the command that makes a run, without its seed and without options that depend on the machine."""
    identity = run.identity
    usual = default_fields(identity)
    words = ["exitkit", "train"]
    for key in _OPTIONS:
        if key in identity and (key in _ALWAYS or identity[key] != usual.get(key)):
            words += [f"--{key.replace('_', '-')}", as_text(identity[key])]
    if initial := getattr(run.recipe, "init_from", None):
        words += ["--init-from", initial]
    for key, value in identity.items():
        if key in (*_OPTIONS, *_SET_BY_EXITKIT) or key.startswith("ingredients.") or value == "[]":
            continue  # milestones are empty unless the schedule uses them
        if value != usual.get(key) or (key.endswith(".variant") and value != "null"):  # other defaults are its own
            words += ["--set", f"{key}={as_text(value)}"]
    return shlex.join(words)


def hardware(runs: Iterable[RunFolder]) -> str:
    """Return the devices of runs, with the number of threads on CPUs and the number of ranks.

    Raises:
        DamagedError: the record of a run is missing or damaged.
    """
    machines: dict[str, None] = {}
    for run in runs:
        facts = run.environment()
        device = facts["gpu"] or facts.get("processor") or facts["device"]
        threads, ranks = run.recipe.threads, facts.get("ranks", 1)
        counts = [] if facts["gpu"] else [f"{counted(threads, 'thread')} per run"]
        counts += [f"{ranks} ranks"] if ranks > 1 else []
        machines[f"{device} ({', '.join(counts)})" if counts else device] = None
    return "; ".join(machines)


def versions(runs: Iterable[RunFolder]) -> str:
    """Return the versions of exitkit, PyTorch, Python and the system with which runs began.

    Raises:
        DamagedError: the record of a run is missing or damaged.
    """
    lines: dict[str, None] = {}
    for run in runs:
        facts = run.environment()
        words = [f"exitkit {facts['exitkit']}", f"PyTorch {facts['torch']}"]
        words += [f"Python {facts['python']}"] if "python" in facts else []
        words += [facts["system"]] if "system" in facts else []
        lines[", ".join(words)] = None
    return "; ".join(lines)


def _runs(known: Sequence[RunFolder], count: int) -> str:
    text = counted(count, "run")
    days = sorted(run.environment().get("started", "")[:10] for run in known)
    if not days or not days[0]:
        return text
    return f"{text}, begun {days[0]}" if days[0] == days[-1] else f"{text}, begun {days[0]} to {days[-1]}"
