"""Measured latency and energy of networks."""
