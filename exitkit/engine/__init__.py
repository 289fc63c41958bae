"""Devices, precision, ranks and randomness of a run."""

from exitkit.engine.devices import Placement, choose_device
from exitkit.engine.engine import Engine
from exitkit.engine.precision import Arithmetic, Precision
from exitkit.engine.ranks import Ranks

__all__ = ["Arithmetic", "Engine", "Placement", "Precision", "Ranks", "choose_device"]
