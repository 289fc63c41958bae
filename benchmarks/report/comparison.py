"""A comparison: tidy tables of finished runs, averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from exitkit.benchmarks.report.labels import Names
from exitkit.benchmarks.report.options import COST_COLUMNS, ReportOptions

BASELINE = "joint"


STATIC = "static"
"""What runs are called that were trained for one exit alone: reference points, not curves."""


GROUP = ["backbone", "dataset"]
"""What is compared within: methods meet on the same backbone and data set only."""


@dataclass(frozen=True)
class Missing:
    """A run that was planned and is not there: its identity, and why not."""

    identity: Mapping[str, str]
    reason: str


@dataclass(frozen=True)
class Context:
    """What run folders alone do not say: what a paper has in the place of ours, and what was planned.

    Attributes:
        title, note: of the comparison.
        published: tables of the papers that it is to stand beside; none: every one that fits.
        stands_for: {name of a run's folder: {"backbone" or "dataset": the paper's}}.
        missing: runs that were planned and failed, or have not been made.
    """

    title: str = ""
    note: str = ""
    published: Sequence[str] = ()
    stands_for: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    missing: Sequence[Missing] = ()


@dataclass(frozen=True)
class Comparison:
    """Tidy tables, averaged over seeds.

    Accuracies are in percent, costs in multiply-adds of one image (convention `macs`; `papers` beside it) or in what
    `options.cost` says, sd is the sample's (n - 1; NaN for one seed), n counts seeds. Methods keep the order they were
    given in; they are told apart by the fields in which they differ (see `labels`).
    """

    options: ReportOptions
    context: Context
    anytime: pd.DataFrame
    """method, backbone, dataset, exit, papers, macs (, milliseconds), accuracy_mean, accuracy_sd, n."""
    budgeted: pd.DataFrame
    """method, backbone, dataset, budget, cost_mean (realised on test), accuracy_mean, accuracy_sd, n."""
    curve: pd.DataFrame
    """method, backbone, dataset, point (the papers' p, 1..39), cost_mean, accuracy_mean, accuracy_sd, n."""
    points: pd.DataFrame
    """method, backbone, dataset, point, and means over seeds of cost, accuracy, threshold_k and share_k."""
    oracle: pd.DataFrame
    """method, backbone, dataset, exit, cost_mean, accuracy_mean, accuracy_sd, n: the best any exit rule could do."""
    static: pd.DataFrame
    """backbone, dataset, exit, cost_mean, accuracy_mean, accuracy_sd, n: networks trained for one exit alone."""
    stitched: pd.DataFrame
    """method, family, dataset, budget, cost_mean, accuracy_mean, accuracy_sd, n: networks of several sizes as one."""
    calibration: pd.DataFrame
    """method, backbone, dataset, where ("exit 1", ..., "point 1", ...), error_mean, error_sd (percent), n."""
    risk: pd.DataFrame
    """method, backbone, dataset, found (seeds), cost_mean, accuracy_mean, accuracy_sd, drop_mean, n.

    The cheapest operating point that loses at most `options.risk` points of accuracy against the full network, with
    certainty `options.certainty`; seeds for which none could be found count with the full network.
    """
    verdicts: pd.DataFrame
    """backbone, dataset, where, budget, best, accuracy, second, lead, low, high, p_holm, verdict: see `verdicts`."""
    differences: pd.DataFrame
    """method, backbone, dataset, baseline, measure ("exit 1", ..., "area"), mean, low, high, p, p_holm, n.

    Seed by seed against the baseline, in points of accuracy, with a 95 % t-interval; `p_holm` is corrected for the
    methods of the table. "area" is the mean height of the budgeted curve between the costs that the curves of all
    runs reach.
    """
    published: pd.DataFrame
    """method, backbone, dataset, paper, table, exit, accuracy_mean (ours), published, epochs, published_epochs,
    batch_size, published_batch_size, published_backbone, published_dataset, unlike ("network, data, schedule": in what
    ours is not the paper's experiment), note.

    Empty where no paper has numbers for what was run.
    """
    training: pd.DataFrame
    """method, backbone, dataset, seconds_mean, seconds_sd, time_relative, memory_mib, memory_relative, n.

    Seconds of training, all epochs and phases; relative to the baseline, or to the first method where that is not.
    """
    missing: pd.DataFrame
    """method, backbone, dataset, seed, reason: runs that belong into the table and are not there."""
    notes: Mapping[tuple[str, str], Sequence[str]]
    """{(backbone, dataset): in what its methods differ besides the method}."""
    shared: Mapping[tuple[str, str], str]
    """{(backbone, dataset): what all its runs have in common}."""
    images: Mapping[str, Sequence[str]]
    """{dataset: of how many images and classes its runs are}; more than one where they differ."""

    names: Mapping[str, Names]
    """{name of a run's folder: what it is called}."""

    def frames(self) -> dict[str, pd.DataFrame]:
        """Return all tables by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, pd.DataFrame)}

    @property
    def cost_column(self) -> str:
        """The column of `anytime` that holds the cost."""
        return COST_COLUMNS[self.options.cost]
