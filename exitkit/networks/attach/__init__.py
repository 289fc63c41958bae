"""Exits attached to any network: tracing, splitting into stages, and networks of torchvision, timm and transformers."""
