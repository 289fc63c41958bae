"""Files of a comparison besides its runs: the plan, and the reasons of failed runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.benchmarks.report.comparison import Context, Missing
from exitkit.errors import UserError
from exitkit.files import exists, make_folder, read_json, write_json
from exitkit.runs.folder import RESULTS
from exitkit.runs.recipe import flat_identity

if TYPE_CHECKING:
    from exitkit.benchmarks.campaign.plan import Plan, Planned
    from exitkit.runs.recipe import ResolvedRecipe

PLAN = "comparison.json"
FAILURES = "failures"


def write_plan(out: Path, plan: Plan, runs: Sequence[Planned], line: str) -> None:
    """Write the planned runs and the command line to the folder of the comparison."""
    make_folder(out)
    planned = [
        {"run": run.recipe.id, "recipe": run.recipe.model_dump(mode="json"), "stands_for": dict(run.stands_for)}
        for run in runs
    ]
    about = {"command": line, "title": plan.title, "note": plan.note, "published": list(plan.published)}
    report = dict(plan.report) | ({} if "baseline" in plan.report else {"baseline": plan.baseline})
    write_json(out / PLAN, about | {"report": report, "runs": planned})


def read_plan(out: Path) -> tuple[Context, dict[str, Any], list[str]]:
    """Return the context, the report options and the names of the planned runs, in order, of a folder's plan.

    All are empty for a folder without a plan.

    Raises:
        UserError: the plan is damaged.
    """
    # Imported when used: the command line's help must not load torch.
    from exitkit.runs.recipe import ResolvedRecipe

    if not exists(out / PLAN):
        return Context(), {}, []
    plan = read_json(out / PLAN)
    try:
        if not isinstance(plan["report"], dict) or not all(isinstance(plan[key], str) for key in ("title", "note")):
            raise TypeError("report, title or note has the wrong type")
        recipes = [ResolvedRecipe.make(**run["recipe"]) for run in plan["runs"]]
        stands_for = {recipe.id: run["stands_for"] for recipe, run in zip(recipes, plan["runs"], strict=True)}
        report: dict[str, Any] = plan["report"]
        context = Context(plan["title"], plan["note"], plan["published"], stands_for, missing(out, recipes))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{out / PLAN} is damaged ({error}); delete it, or run exitkit compare again") from None
    return context, report, [recipe.id for recipe in recipes]


def command(out: Path) -> str:
    """Return the command line that trained the runs of a folder."""
    if not exists(out / PLAN):
        return f"exitkit train --recipe RUN/recipe.json --out {out.name}"
    plan = read_json(out / PLAN)
    line = plan.get("command") if isinstance(plan, dict) else None
    return line if isinstance(line, str) else "exitkit compare"


def missing(out: Path, recipes: Sequence[ResolvedRecipe]) -> list[Missing]:
    """Return the runs of these recipes that are not finished in `out`, with the known reasons."""
    unfinished = []
    for recipe in recipes:
        if not exists(out / recipe.id / RESULTS):
            reason = failure(out, recipe.id) or "not trained yet"
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
