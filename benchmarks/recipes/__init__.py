"""Recipes of comparisons, one TOML file each: `exitkit compare --recipe NAME`."""
