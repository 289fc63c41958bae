"""A comparison: tidy tables of finished runs, averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from exitkit.benchmarks.report.labels import Names
from exitkit.benchmarks.report.options import COST_COLUMNS, ReportOptions

if TYPE_CHECKING:
    from exitkit.benchmarks.report.measure import Measured

BASELINE = "joint"


STATIC = "static"
"""The label of static networks, which were trained with one exit only; they are shown as points."""


GROUP = ["backbone", "dataset"]
"""Methods are compared on the same backbone and data set only."""


NOT_TRAINED = "not trained yet"
"""The reason of a planned run that was not started or not finished."""


@dataclass(frozen=True)
class Missing:
    """A planned run that is not finished: its identity, and the reason."""

    identity: Mapping[str, str]
    reason: str


@dataclass(frozen=True)
class Context:
    """Information about a comparison that run folders do not contain.

    Attributes:
        title, note: title and note of the comparison.
        published: the papers' tables to compare with; empty: every table that fits.
        stands_for: {name of a run's folder: {"backbone" or "dataset": name of the paper's one}}.
        missing: planned runs that failed or have not been trained.
        commands: the command lines of the comparisons; empty if the runs are of none.
    """

    title: str = ""
    note: str = ""
    published: Sequence[str] = ()
    stands_for: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    missing: Sequence[Missing] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Tidy tables, averaged over seeds.

    Accuracies are in percent. Costs are in multiply-adds per image (`macs`, and the papers' count `papers`), or in the
    unit of `options.cost`. sd is the sample standard deviation (n - 1; NaN for one seed), n the number of seeds.
    Methods are in the order of the runs; their labels contain the fields in which they differ (see `labels`).
    """

    options: ReportOptions
    context: Context
    anytime: pd.DataFrame
    """method, backbone, dataset, exit, papers, macs (, milliseconds), accuracy_mean, accuracy_sd, n."""
    budgeted: pd.DataFrame
    """method, backbone, dataset, budget, cost_mean (realised on test), accuracy_mean, accuracy_sd, n."""
    spent: pd.DataFrame
    """method, backbone, dataset, budget, validation, test, n: mean cost on validation and on test at each budget."""
    curve: pd.DataFrame
    """method, backbone, dataset, point (the papers' p, 1..39), cost_mean, accuracy_mean, accuracy_sd, n."""
    points: pd.DataFrame
    """method, backbone, dataset, point, and means over seeds of cost, accuracy, threshold_k and share_k."""
    oracle: pd.DataFrame
    """method, backbone, dataset, exit, cost_mean, accuracy_mean, accuracy_sd, n: upper bound of all exit rules."""
    static: pd.DataFrame
    """backbone, dataset, exit, cost_mean, accuracy_mean, accuracy_sd, n: networks trained with one exit only."""
    stitched: pd.DataFrame
    """method, family, dataset, budget, cost_mean, accuracy_mean, accuracy_sd, n: combined networks of several sizes."""
    calibration: pd.DataFrame
    """method, backbone, dataset, where ("exit 1", ..., "point 1", ...), error_mean, error_sd (percent), n."""
    balanced: pd.DataFrame
    """method, backbone, dataset, exit, balanced_mean, balanced_sd, n, majority, chance, learned.

    Balanced accuracy: the mean recall of the classes. Always answering the most frequent class has the accuracy
    `majority`, and the balanced accuracy `chance`. `learned`: fraction of the seeds that are better than chance.
    """
    recall: pd.DataFrame
    """method, backbone, dataset, class, images, exit, recall_mean, recall_sd, n; empty unless requested."""
    targets: pd.DataFrame
    """method, backbone, dataset, target, unit, planned, validation_cost, cost (on test), accuracy_mean, accuracy_sd,
    full, share_1, ..., n: of `options.targets`; n counts the seeds that reach the target, and `reason` says why others
    don't. Empty if the options have no targets.
    """
    risk: pd.DataFrame
    """method, backbone, dataset, found (seeds), cost_mean, accuracy_mean, accuracy_sd, drop_mean, n.

    The lowest-cost operating point that loses less than `options.risk` percentage points of accuracy against the full
    network, with confidence `options.certainty`; the full network is used for seeds without such a point.
    """
    policies: pd.DataFrame
    """method, backbone, dataset, policy, budget, cost_mean, accuracy_mean, accuracy_sd, n: of `options.policy`.

    Of each policy, the operating point that is most accurate within the budget, both cross-fitted on validation. Empty
    if the options have no policies, as are the following two tables.
    """
    policy_curve: pd.DataFrame
    """method, backbone, dataset, policy, point, cost_mean, accuracy_mean, accuracy_sd, n."""
    policy_differences: pd.DataFrame
    """method, backbone, dataset, policy, budgets, mean, low, high, p, p_holm, n: see `differences`.

    Accuracy within the budgets, on average over them, against plain confidence on the same runs, paired by seed. Only
    budgets at which the policy has an operating point for every seed count; `budgets` is their number.
    """
    verdicts: pd.DataFrame
    """backbone, dataset, where, budget, best, accuracy, second, lead, low, high, p_holm, verdict: see `verdicts`."""
    differences: pd.DataFrame
    """method, backbone, dataset, baseline, measure ("exit 1", ..., "area"), mean, low, high, p, p_holm, n.

    Paired by seed against the baseline, in percentage points of accuracy, with a 95 % t-interval; `p_holm` is corrected
    for the methods of the table. "area" is the mean height of the budgeted curve over the range of costs that the
    curves of all runs cover.
    """
    published: pd.DataFrame
    """method, backbone, dataset, paper, table, exit, accuracy_mean (ours), published, epochs, published_epochs,
    batch_size, published_batch_size, published_backbone, published_dataset, unlike (what differs from the paper's
    experiment: "network", "data", "schedule"), note.

    Empty if no paper has results for these runs.
    """
    training: pd.DataFrame
    """method, backbone, dataset, seconds_mean, seconds_sd, time_relative, memory_mib, memory_relative, n.

    Seconds of training over all epochs and phases; relative to the baseline, or to the first method without it. Empty
    if the options exclude times.
    """
    missing: pd.DataFrame
    """method, backbone, dataset, seed, reason: runs that are missing from the tables."""
    notes: Mapping[tuple[str, str], Sequence[str]]
    """{(backbone, dataset): fields of the recipe in which its methods differ}."""
    shared: Mapping[tuple[str, str], str]
    """{(backbone, dataset): settings that all its runs share}."""
    images: Mapping[str, Sequence[str]]
    """{dataset: numbers of images and classes, as text}; several entries if the runs differ."""

    names: Mapping[str, Names]
    """{name of a run's folder: its labels}."""

    budgets: Mapping[tuple[str, str], np.ndarray]
    """{(backbone, dataset): average budgets of the budgeted table}."""

    measured: Mapping[str, Measured]
    """{name of a run's folder: its measures}."""

    def frames(self) -> dict[str, pd.DataFrame]:
        """Return all tables by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, pd.DataFrame)}

    @property
    def cost_column(self) -> str:
        """The column of `anytime` that holds the cost."""
        return COST_COLUMNS[self.options.cost]
