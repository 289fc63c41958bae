"""Recipes of comparisons, one TOML file per recipe, for `exitkit compare --recipe NAME`."""
