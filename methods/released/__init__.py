"""Variants that reproduce what the authors' released code does otherwise than their papers."""
