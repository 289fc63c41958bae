"""Campaigns: many runs at once, from the plan of a comparison to what is recorded of it."""
