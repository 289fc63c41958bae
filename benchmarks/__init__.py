"""Benchmarks: campaigns of runs, their tables and figures, recipes, published results and speed measurements."""
