"""Families of networks, each with its presets."""
