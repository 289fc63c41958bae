"""Options of fine-tuning: the optimiser, a learning rate per part, mixed images, and the average of the weights.

They are keys of a recipe (`exitkit.runs.recipe.FINE_TUNING`), which every method can be trained with unless it refuses
them. Warm-up is part of the schedule: `exitkit.training.batches.learning_rate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError
from exitkit.escaping import counted
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.runs.recipe import FINE_TUNING, Recipe, ResolvedRecipe
from exitkit.strategy.base import Phase
from exitkit.strategy.run import Run

TRUNK = "stages."
"""The beginning of the names of the trunk's parameters."""

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes images [B, C, H, W] and labels [B], and returns mixed images and shares of the classes [B, classes]."""


def check_options(recipe: ResolvedRecipe, phases: Sequence[Phase]) -> None:
    """Check that the options of a recipe have an effect on its phases, and that their method takes them.

    Args:
        recipe: the recipe.
        phases: the phases that are trained.

    Raises:
        UserError: an option is refused, or changes nothing.
    """
    given = {key: getattr(recipe, key) for key in FINE_TUNING}
    given = {key: value for key, value in given.items() if value != Recipe.model_fields[key].default}
    for key, value in given.items():
        reasons = [phase.strategy.refuses()[key] for phase in phases if key in phase.strategy.refuses()]
        reasons = reasons or [_effect(key, recipe, phases)]
        if reasons[0]:
            raise UserError(f"method {recipe.method} can't be trained with {key}={value}: {reasons[0]}")
    epochs = sum(phase.epochs for phase in phases)
    if recipe.probe_every and recipe.probe_every > epochs:
        raise UserError(f"probe_every is {recipe.probe_every}; expected at most {epochs}, the number of epochs")


def _effect(key: str, recipe: ResolvedRecipe, phases: Sequence[Phase]) -> str:
    """Return why an option is impossible in these phases, or ""."""
    if key == "optimizer" and all(phase.optimizer for phase in phases):
        return "its phases have optimisers of their own"
    if key == "trunk_lr_factor" and not any(_trains_trunk(phase) for phase in phases):
        return "its trunk is not trained"
    if key in ("mixup", "cutmix"):
        fixed = [phase for phase in phases if phase.trunk is not None and phase.trunk.views is not None]
        return "the trunk sees fixed views of the images; expected views=none" if fixed else ""
    if key == "warmup":
        short = [phase for phase in phases if phase.epochs <= recipe.warmup]
        return (
            f"phase {short[0].name} has {counted(short[0].epochs, 'epoch')}; expected fewer for warm-up"
            if short
            else ""
        )
    return ""


def _trains_trunk(phase: Phase) -> bool:
    if isinstance(phase.train, tuple):
        return any(prefix.startswith(TRUNK) or TRUNK.startswith(prefix) for prefix in phase.train)
    return phase.train == "all"


def make_optimizer(recipe: ResolvedRecipe, phase: Phase, network: MultiExitNetwork) -> torch.optim.Optimizer:
    """Return the optimiser of a phase, for the parameters of the network that require gradients.

    With a `trunk_lr_factor` the parameters of the trunk are the first of two groups; a group's `lr_factor` multiplies
    the rate of the schedule.
    """
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    groups: list[dict[str, Any]] = [{"params": list(named.values())}]
    if recipe.trunk_lr_factor != 1:
        trunk = [parameter for name, parameter in named.items() if name.startswith(TRUNK)]
        rest = [parameter for name, parameter in named.items() if not name.startswith(TRUNK)]
        groups = [{"params": trunk, "lr_factor": recipe.trunk_lr_factor}, {"params": rest, "lr_factor": 1.0}]
        groups = [group for group in groups if group["params"]]
    lr, decay = recipe.lr if phase.lr is None else phase.lr, recipe.weight_decay
    kind = phase.optimizer or recipe.optimizer
    if kind == "adam":
        return torch.optim.Adam(groups, lr, weight_decay=decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr, (recipe.momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(groups, lr, recipe.momentum, weight_decay=decay)


def make_mix(recipe: ResolvedRecipe, classes: int) -> Mix | None:
    """Return what mixes the images of a batch, or None; with `mixup` and `cutmix` each batch has one of them."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    v2 = torchvision("transforms.v2")
    chosen = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup else []
    chosen += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix else []
    mix: Mix = chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
    return mix


class WeightAverage:
    """The exponential moving average of a network's weights and running statistics, over the steps of a phase.

    With the weights w_1, w_2, ... after each step of the optimiser, and the decay d,

        e_1 = w_1,    e_n = d e_{n-1} + (1 - d) w_n.

    Args:
        run: the run; its optimiser calls `update` after each step.
        decay: d.
    """

    def __init__(self, run: Run, decay: float) -> None:
        self._run = run
        self._averaged = AveragedModel(run.network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        run.optimizer.register_step_post_hook(lambda *_: self._averaged.update_parameters(run.network))

    @property
    def network(self) -> MultiExitNetwork:
        """The network with the averaged weights."""
        return cast(MultiExitNetwork, self._averaged.module)

    def end(self) -> None:
        """Give the network the averaged weights."""
        self._run.network.load_state_dict(self.network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the average, and how many steps it has seen."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the average."""
        self._averaged.load_state_dict(state)
