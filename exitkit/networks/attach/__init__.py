"""Exits attached to any network: tracing, splitting into stages, and torchvision's models."""
