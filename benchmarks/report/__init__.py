"""Tables and figures of finished runs, from the files in their folders; no network is loaded.

`collect` evaluates runs and averages over seeds; `print_report` prints the result, `write_report` writes it.
"""

from __future__ import annotations

from exitkit.benchmarks.report.collect import collect, collect_intact
from exitkit.benchmarks.report.comparison import Comparison, Context, Missing
from exitkit.benchmarks.report.console import print_report
from exitkit.benchmarks.report.figures import anytime_figure, budgeted_figure
from exitkit.benchmarks.report.measure import FinishedRun
from exitkit.benchmarks.report.options import ReportOptions
from exitkit.benchmarks.report.summary import write_summary
from exitkit.benchmarks.report.write import write_report

__all__ = [
    "Comparison",
    "Context",
    "FinishedRun",
    "Missing",
    "ReportOptions",
    "anytime_figure",
    "budgeted_figure",
    "collect",
    "collect_intact",
    "print_report",
    "write_report",
    "write_summary",
]
