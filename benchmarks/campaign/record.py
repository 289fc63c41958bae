"""What a comparison leaves in its folder besides the runs: what was planned, and which runs failed and why."""

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
    """Write what is planned, and by which command line, into the folder of the comparison."""
    make_folder(out)
    planned = [
        {"run": each.recipe.id, "recipe": each.recipe.model_dump(mode="json"), "stands_for": dict(each.stands_for)}
        for each in runs
    ]
    about = {"command": line, "title": plan.title, "note": plan.note, "published": list(plan.published)}
    report = dict(plan.report) | ({} if "baseline" in plan.report else {"baseline": plan.baseline})
    write_json(out / PLAN, about | {"report": report, "runs": planned})


def read_plan(out: Path) -> tuple[Context, dict[str, Any], list[str]]:
    """Return what a folder's plan says besides its runs: context, report options, and the planned runs' names in order.

    A folder without a plan has none of it.

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
            raise TypeError("report, title or note is of the wrong kind")
        recipes = [ResolvedRecipe.make(**each["recipe"]) for each in plan["runs"]]
        stands_for = {recipe.id: each["stands_for"] for recipe, each in zip(recipes, plan["runs"], strict=True)}
        report: dict[str, Any] = plan["report"]
        context = Context(plan["title"], plan["note"], plan["published"], stands_for, missing(out, recipes))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{out / PLAN} is damaged ({error}); delete it, or compare again") from None
    return context, report, [recipe.id for recipe in recipes]


def command(out: Path) -> str:
    """Return the command line that made the runs of a folder."""
    if not exists(out / PLAN):
        return f"exitkit train --recipe RUN/recipe.json --out {out.name}"
    plan = read_json(out / PLAN)
    line = plan.get("command") if isinstance(plan, dict) else None
    return line if isinstance(line, str) else "exitkit compare"


def missing(out: Path, recipes: Sequence[ResolvedRecipe]) -> list[Missing]:
    """Return those of the recipes' runs that are not finished in `out`, each with what is known of the reason."""
    found = []
    for recipe in recipes:
        if not exists(out / recipe.id / RESULTS):
            reason = failure(out, recipe.id) or "not made yet"
            found.append(Missing(flat_identity(recipe), reason))
    return found


def note_failure(out: Path, recipe: ResolvedRecipe, reason: str) -> None:
    """Write down why a run failed."""
    make_folder(out / FAILURES)
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_json(out / FAILURES / f"{recipe.id}.json", {"reason": reason, "when": when})


def forget_failure(out: Path, recipe: ResolvedRecipe) -> None:
    """Forget why a run failed, now that it is tried again."""
    (out / FAILURES / f"{recipe.id}.json").unlink(missing_ok=True)


def failure(out: Path, name: str) -> str:
    """Return why the run of this name failed; "" if it did not."""
    path = out / FAILURES / f"{name}.json"
    if not exists(path):
        return ""
    content = read_json(path)
    reason = content.get("reason") if isinstance(content, dict) else None
    return f"failed: {reason or 'no reason is left'}"
