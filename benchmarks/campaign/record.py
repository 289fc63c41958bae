"""Files of a comparison besides its runs: its plan, and the reasons of failed runs.

A folder may hold several comparisons. Each has a file of its own, `comparison-DIGEST.json`; the digest is that of the
planned runs without the folder of their images, the title, the note and the options of the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired

# Before Python 3.12 pydantic takes no other.
from typing_extensions import TypedDict

from exitkit.benchmarks.report.comparison import NOT_TRAINED, Context, Missing
from exitkit.errors import DamagedError, UserError
from exitkit.files import checked, exists, make_folder, read_json, write_json
from exitkit.runs.folder import RESULTS
from exitkit.runs.recipe import EXECUTION, flat_identity

if TYPE_CHECKING:
    from exitkit.benchmarks.campaign.plan import Plan, Planned
    from exitkit.runs.recipe import ResolvedRecipe

_OLD_PLAN = "comparison.json"
"""The file of a folder's only plan, in earlier releases."""
FAILURES = "failures"
BESIDE = ("report", "slurm", "comparison*.json", FAILURES)
"""Patterns of the names of what a comparison writes beside its runs."""
_PLANS = (_OLD_PLAN, f"comparison-{'[0-9a-f]' * 8}.json")


class _PlannedRun(TypedDict):
    """A planned run as the file of the plan has it."""

    run: str
    recipe: dict[str, Any]
    stands_for: dict[str, str]


class _Plan(TypedDict):
    """The content of the file of a plan."""

    command: NotRequired[str]
    title: str
    note: str
    published: list[str]
    report: dict[str, Any]
    runs: list[_PlannedRun]


def write_plan(out: Path, plan: Plan, runs: Sequence[Planned], line: str) -> Path:
    """Write the planned runs and the command line to the folder of the comparison, and return the file."""
    make_folder(out)
    planned = [
        {"run": run.recipe.id, "recipe": run.recipe.model_dump(mode="json"), "stands_for": dict(run.stands_for)}
        for run in runs
    ]
    about = {"title": plan.title, "note": plan.note, "published": list(plan.published)}
    content = about | {"report": report_options(plan), "runs": planned}
    path = _same(out, content) or out / f"comparison-{_digest(content)}.json"
    write_json(path, {"command": line} | content)
    _replace_old(out, content)
    return path


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_comparable(content), sort_keys=True).encode()).hexdigest()[:8]


def _comparable(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan without the command, and without keys such as the device, which do not change its results."""
    runs = [run | {"recipe": run["recipe"] | dict.fromkeys(EXECUTION)} for run in plan["runs"]]
    return {key: value for key, value in plan.items() if key != "command"} | {"runs": runs}


def _portable(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan without the folder of the images, which is one of this machine."""
    runs = [run | {"recipe": run["recipe"] | {"data_dir": None}} for run in plan["runs"]]
    return {**plan, "runs": runs}


def _same(out: Path, content: Mapping[str, Any]) -> Path | None:
    """Return the file in which another version or machine wrote the same plan; None without one."""
    wanted = _comparable(content)
    for path in out.glob("comparison-*.json"):
        with contextlib.suppress(DamagedError, KeyError, TypeError):
            if _comparable(read_json(path)) == wanted:
                return path
    return None


def _replace_old(out: Path, content: Mapping[str, Any]) -> None:
    """Delete the file in which an earlier release wrote the same plan."""
    with contextlib.suppress(DamagedError):
        if exists(out / _OLD_PLAN):
            old = read_json(out / _OLD_PLAN)
            if isinstance(old, dict) and {key: value for key, value in old.items() if key != "command"} == content:
                (out / _OLD_PLAN).unlink(missing_ok=True)


def report_options(plan: Plan) -> dict[str, Any]:
    """Return the options of the report of a plan."""
    return dict(plan.report) | ({} if "baseline" in plan.report else {"baseline": plan.baseline})


def context_of(out: Path, plan: Plan, runs: Sequence[Planned], line: str = "") -> Context:
    """Return the context of a comparison's report from its own plan, and the command line."""
    stands_for = {run.recipe.id: dict(run.stands_for) for run in runs}
    recipes = [run.recipe for run in runs]
    return Context(
        plan.title, plan.note, list(plan.published), stands_for, missing(out, recipes), [line] if line else []
    )


def plans(folder: Path) -> list[Path]:
    """Return the files of the plans in a folder of runs, the oldest first."""
    files = {path for pattern in _PLANS for path in folder.glob(pattern)}
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name))


class Comparisons(NamedTuple):
    """The comparisons that a report is about.

    Attributes:
        folder: the folder of the runs.
        context: what the run folders do not contain; without title and note if several comparisons differ in them.
        report: options of the report that all comparisons agree on.
        order: names of the planned runs, in order.
        only: whether the report is about these runs only, and not about all runs of the folder.
        files: the files of the plans.
    """

    folder: Path
    context: Context
    report: dict[str, Any]
    order: list[str]
    only: bool
    files: list[Path]


def read_plan(source: Path) -> Comparisons:
    """Return the comparisons in a folder of runs, or that of one file of a plan.

    Raises:
        UserError: a plan is damaged.
    """
    if source.suffix == ".json" and source.is_file():
        context, report, order = _read(source, source.parent)
        return Comparisons(source.parent, context, report, order, True, [source])
    files = plans(source)
    contents = [_read(path, source) for path in files]
    if len(contents) == 1:
        return Comparisons(source, *contents[0], False, files)
    return Comparisons(source, *_merged(contents), False, files)


def _merged(contents: Sequence[tuple[Context, dict[str, Any], list[str]]]) -> tuple[Context, dict[str, Any], list[str]]:
    """Return what several plans agree on, and the runs of all of them; nothing for no plan."""
    if not contents:
        return Context(), {}, []
    contexts = [context for context, _, _ in contents]
    first, options = contents[0][:2]
    agreed = {key: value for key, value in options.items() if all(o.get(key) == value for _, o, _ in contents)}
    same = {
        name: getattr(first, name) if len({getattr(context, name) for context in contexts}) == 1 else ""
        for name in ("title", "note")
    }
    # A missing run of several plans is missing once.
    absent = {json.dumps(dict(run.identity), sort_keys=True): run for c in contexts for run in c.missing}
    stands_for = {name: values for context in contexts for name, values in context.stands_for.items()}
    published = [] if any(not c.published for c in contexts) else [table for c in contexts for table in c.published]
    context = Context(same["title"], same["note"], list(dict.fromkeys(published)), stands_for, list(absent.values()))
    order = list(dict.fromkeys(name for _, _, names in contents for name in names))
    commands = list(dict.fromkeys(line for c in contexts for line in c.commands))
    return replace(context, commands=commands), agreed, order


def _read(path: Path, out: Path) -> tuple[Context, dict[str, Any], list[str]]:
    """Return the context, the options of the report and the names of the planned runs of one plan."""
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.recipe import ResolvedRecipe

    plan = checked(path, _Plan, read_json(path))
    try:
        recipes = [ResolvedRecipe.make(**run["recipe"]) for run in plan["runs"]]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or run exitkit compare again") from None
    stands_for = {recipe.id: run["stands_for"] for recipe, run in zip(recipes, plan["runs"], strict=True)}
    line = plan.get("command", "exitkit compare")
    context = Context(plan["title"], plan["note"], plan["published"], stands_for, missing(out, recipes), [line])
    return context, plan["report"], [recipe.id for recipe in recipes]


def copy_plan(comparisons: Comparisons, target: Path) -> None:
    """Copy the plans, without the folder of the images, and the reasons of failed runs to another folder of runs."""
    for path in comparisons.files:
        write_json(target / path.name, _portable(read_json(path)))
    for path in sorted((comparisons.folder / FAILURES).glob("*.json")):
        make_folder(target / FAILURES)
        write_json(target / FAILURES / path.name, read_json(path))


def missing(out: Path, recipes: Sequence[ResolvedRecipe]) -> list[Missing]:
    """Return the runs of these recipes that are not finished in `out`, with the known reasons."""
    unfinished = []
    for recipe in recipes:
        if not exists(out / recipe.id / RESULTS):
            reason = failure(out, recipe.id) or NOT_TRAINED
            unfinished.append(Missing(flat_identity(recipe), reason))
    return unfinished


def note_failure(out: Path, recipe: ResolvedRecipe, reason: str) -> None:
    """Write the reason why a run failed."""
    make_folder(out / FAILURES)
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(out / FAILURES / f"{recipe.id}.json", {"reason": reason, "when": when})


def forget_failure(out: Path, recipe: ResolvedRecipe) -> None:
    """Remove the reason of a failed run, before it is trained again."""
    (out / FAILURES / f"{recipe.id}.json").unlink(missing_ok=True)


def failure(out: Path, name: str) -> str:
    """Return why a run failed; "" if it did not."""
    path = out / FAILURES / f"{name}.json"
    if not exists(path):
        return ""
    content = read_json(path)
    reason = content.get("reason") if isinstance(content, dict) else None
    return f"failed: {reason or 'no reason recorded'}"
