"""Public interface for training methods: `TrainingStrategy`, `Run`, and building blocks of methods."""

from exitkit.data.base import Batch
from exitkit.errors import NonFiniteError, UserError
from exitkit.networks.cascade import Outputs
from exitkit.plugins import forwarded, forwards, method_parts, resolve_variant, setting
from exitkit.strategy.auxiliary import Auxiliary
from exitkit.strategy.base import (
    EXIT_WEIGHTS,
    GRADIENT_TAP,
    LOGIT_LINK,
    OBJECTIVE,
    PHASES,
    SLOTS,
    UPDATE,
    FrozenTrunk,
    LearnedTable,
    Phase,
    TrainingStrategy,
    Variant,
    at_least_float32,
    weighted_sum,
)
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.branches import Branches
from exitkit.strategy.composition import Composition, build_strategy
from exitkit.strategy.position import Position
from exitkit.strategy.replicas import Replicas
from exitkit.strategy.run import Run

__all__ = [
    "EXIT_WEIGHTS",
    "GRADIENT_TAP",
    "LOGIT_LINK",
    "OBJECTIVE",
    "PHASES",
    "SLOTS",
    "UPDATE",
    "Auxiliary",
    "Batch",
    "Branches",
    "Composition",
    "FrozenTrunk",
    "LearnedTable",
    "LocalBatch",
    "NonFiniteError",
    "Outputs",
    "Phase",
    "Position",
    "Replicas",
    "Run",
    "TrainingStrategy",
    "UserError",
    "Variant",
    "at_least_float32",
    "build_strategy",
    "forwarded",
    "forwards",
    "method_parts",
    "resolve_variant",
    "setting",
    "weighted_sum",
]
