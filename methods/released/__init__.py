"""Variants that reproduce the authors' released code where it differs from their papers."""
