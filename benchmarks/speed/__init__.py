"""How fast exitkit is, as ratios taken in one run: `python -m exitkit.benchmarks.speed`."""
