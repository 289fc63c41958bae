"""Operating points that reach a target: what was planned, and what validation and test images really cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from exitkit.errors import UserError
from exitkit.inference.budgets import exit_costs
from exitkit.inference.targets import Target

WORDS = ("budget", "latency", "latency-p95", "lose", "accuracy")


def read_target(text: str) -> Target:
    """Return the target that a text names: "budget 60%", "lose 1 certainty 0.95", "budget 20M at-most".

    Raises:
        UserError: it has other words, or an impossible value.
    """
    words = text.split()
    at_most = words[2:] == ["at-most"]
    certain = len(words) == 4 and words[2] == "certainty"
    if len(words) < 2 or words[0] not in WORDS or not (len(words) == 2 or at_most or certain):
        raise UserError(
            f"target {text!r} is not understood; expected, for example, budget 60% or lose 1 certainty 0.95"
        )
    value: Any = words[1]
    try:
        value = float(value) if words[0] in ("lose", "accuracy") else value
        certainty = float(words[3]) if certain else None
    except ValueError:
        raise UserError(f"target {text!r} has a value that is not a number") from None
    chosen = Target.of(**{words[0].replace("-", "_"): value, "certainty": certainty, "at_most": at_most})
    assert chosen is not None
    return chosen


def target_rows(run: Any, texts: Sequence[str], score: str = "confidence", calibrated: bool = False) -> pd.DataFrame:
    """Return one row per target: target, unit, planned, validation_cost, cost, accuracy, full, share_k and reason.

    Costs are means per image. planned: the budget, or the cost on validation that the operating point was chosen for;
    cost, accuracy, full (the full network's accuracy) and shares: on test. If a target can't be reached, the numbers
    are NaN, and the reason is given.
    """
    rows: list[Mapping[str, Any]] = []
    for text in texts:
        target = read_target(text)
        row: dict[str, Any] = {"target": text, "unit": target.unit, "reason": ""}
        try:
            row |= _reached(run, target, score, calibrated)
        except UserError as error:
            row["reason"] = str(error)
        rows.append(row)
    numbers = ("planned", "validation_cost", "cost", "accuracy", "full")
    return pd.DataFrame(rows).reindex(columns=["target", "unit", *numbers, "reason", *_shares(run)])


def _shares(run: Any) -> list[str]:
    return [f"share_{number}" for number in range(1, len(run.costs()) + 1)]


def _reached(run: Any, target: Target, score: str, calibrated: bool) -> dict[str, Any]:
    # Imported when used: reports without targets need no torch.
    import torch

    from exitkit.inference.choose import outcome_of_outputs, rule_for_outputs

    costs = np.asarray(exit_costs(run, target.unit), dtype=np.float64)
    parts = {part: run.outputs(part) for part in ("validation", "test")}
    validation = parts["validation"]
    rule = rule_for_outputs(validation["logits"], validation["labels"], costs, target, score, calibrated)
    got = {
        part: outcome_of_outputs(rule, torch.from_numpy(outputs["logits"]), torch.from_numpy(outputs["labels"]), costs)
        for part, outputs in parts.items()
    }
    spent, test = got["validation"]["cost"], got["test"]
    row = {"planned": target.cost(costs) if target.kind == "budget" else spent, "validation_cost": spent}
    row["cost"] = test["cost"]
    row |= {"accuracy": test["accuracy"], "full": test["full_accuracy"]}
    return row | {f"share_{number}": share for number, share in enumerate(test["shares"], 1)}
