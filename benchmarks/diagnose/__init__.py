"""Diagnostics: how the exits of a network affect each other, as in the figures of the papers."""
