"""Exits on any network: the trace of its forward, the cut between its units, and torchvision's models."""
