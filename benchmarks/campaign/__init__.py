"""Campaigns: training the runs of a comparison, from its plan to its record."""
