"""Checks what the documents promise of the default comparison: python tests/check_default_comparison.py REPORT."""

import sys
from pathlib import Path

import pandas as pd

folder = Path(sys.argv[1])
anytime = pd.read_csv(folder / "anytime.csv")
accuracy = anytime.pivot(index="method", columns="exit", values="accuracy_mean")
print(accuracy.round(2))
assert list(dict.fromkeys(anytime.method)) == ["joint", "ge", "boostnet", "metagf"]
assert (anytime.n == 2).all()
assert (accuracy[4] > 95).all(), "a last exit is not above 95 %"
assert (accuracy[4] - accuracy[1] >= 2).all(), "the exits of a method do not separate"
budgeted = pd.read_csv(folder / "budgeted.csv")
assert budgeted.groupby("method").size().eq(9).all()
for name in ("anytime", "budgeted"):
    for kind in ("csv", "md", "tex", "png", "pdf"):
        assert (folder / f"{name}.{kind}").stat().st_size > 200
print("the default comparison is as the documents say")
