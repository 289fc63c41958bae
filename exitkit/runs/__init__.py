"""Runs: recipes, what is made of them, their folders and what these hold."""

from exitkit.runs.folder import RunFolder
from exitkit.runs.table import find_runs, load_runs

__all__ = ["RunFolder", "find_runs", "load_runs"]
