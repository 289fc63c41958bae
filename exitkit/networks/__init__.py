"""Public interface of multi-exit networks: cascade, backbones, costs, pruning, folding, compilation, attached exits."""

from exitkit.errors import UserError
from exitkit.networks.attach.exits import attach_exits
from exitkit.networks.build import build_network
from exitkit.networks.cascade import (
    Carry,
    ExitOutput,
    Features,
    GradientTap,
    Head,
    LogitLink,
    MultiExitNetwork,
    Outputs,
    State,
    Units,
    map_tensors,
)
from exitkit.networks.compilation import compile_parts
from exitkit.networks.costs import ExitCost, cost
from exitkit.networks.families.base import IMAGENET, Backbone, Home, preset
from exitkit.networks.folding import fold
from exitkit.networks.ownership import batchnorm_parameters, owners, unreached
from exitkit.networks.placement import place
from exitkit.networks.pruning import prune_to
from exitkit.networks.released.weights import load_released_weights
from exitkit.networks.rescaling import rescale
from exitkit.plugins import setting

__all__ = [
    "IMAGENET",
    "Backbone",
    "Carry",
    "ExitCost",
    "ExitOutput",
    "Features",
    "GradientTap",
    "Head",
    "Home",
    "LogitLink",
    "MultiExitNetwork",
    "Outputs",
    "State",
    "Units",
    "UserError",
    "attach_exits",
    "batchnorm_parameters",
    "build_network",
    "compile_parts",
    "cost",
    "fold",
    "load_released_weights",
    "map_tensors",
    "owners",
    "place",
    "preset",
    "prune_to",
    "rescale",
    "setting",
    "unreached",
]
