"""Runs: recipes, jobs, run folders and the files in them."""

from exitkit.runs.folder import RunFolder
from exitkit.runs.table import find_runs, load_runs

__all__ = ["RunFolder", "find_runs", "load_runs"]
