"""Speed of exitkit, as ratios measured in one process: `python -m exitkit.benchmarks.speed`."""
