"""Timing: latency and energy of networks that are really run."""
