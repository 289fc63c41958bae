"""Meta-GF: train a branch for every exit, then learn how to fuse the branches parameter by parameter.

Paper: Sun et al., Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously, ECCV 2022, section 3 (algorithm 1).
Every epoch starts from W and has K + 1 passes over the data:

1. for each exit e, a branch: W_e = W trained for one pass on  CE_e + 0.1 sum_{j != e} CE_j  (its *expected gradient*
   is W_e - W);
2. one pass that learns the fusion weights eta by Adam on  F(eta) = sum_j CE_j(W(eta)),  where every parameter tensor
   p is fused over the exits that own it (whose output reads it):
   W(eta)[p] = sum_e softmax(eta_p)_e W_e[p];
3. W = W(eta), the fused end points themselves (a step of size 1 along the fused expected gradients).

The paper prints the update with a minus sign although it defines the gradient as end point minus start; the sum above
is what it means. Where the paper leaves something open, this file decides: the momentum is cleared and batch-norm
statistics are set back to W's before every branch and before the fusion pass; all K + 1 passes of an epoch see the same
images, augmented alike; eta starts at 1, its learning rate falls to a tenth at half and at three quarters of the
schedule; batch norm's scales and shifts are fused with equal weights (the paper's last section leaves batch norm out)
unless `fuse_batchnorm` is set.

What differs from the published code: its layer-wise script uses sigmoid weights, learns eta in the first epoch only
(by a re-bound tensor), and lets momentum and batch-norm statistics leak from branch to branch. None of that is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.errors import UserError
from exitkit.gradients import owners
from exitkit.plugins import setting
from exitkit.strategy import UPDATE, TrainingStrategy, weighted_sum

if TYPE_CHECKING:
    from exitkit.data.base import Batch
    from exitkit.network import MultiExitNetwork
    from exitkit.run import Auxiliary, Run


class FusionWeights(nn.Module):
    """eta: one number a parameter tensor and exit, 1 at first.

    Args:
        owned_by: the exits that own each of the T parameter tensors whose fusion is learned.
        exits: K.
    """

    def __init__(self, owned_by: Sequence[Sequence[int]], exits: int) -> None:
        super().__init__()
        owns = torch.zeros(len(owned_by), exits, dtype=torch.bool)
        for row, owning in enumerate(owned_by):
            owns[row, list(owning)] = True
        self.eta = nn.Parameter(torch.ones(len(owned_by), exits))
        self.owns: Tensor
        self.register_buffer("owns", owns)

    def forward(self) -> Tensor:
        """Return the weights [T, K]: a softmax over each tensor's owners, 0 for exits that do not own it."""
        return self.eta.masked_fill(~self.owns, -torch.inf).softmax(1)


@dataclass(eq=False)
class MetaGF(TrainingStrategy):
    """Meta-GF: one branch of training an exit, fused by learned weights, every epoch."""

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})
    paper: ClassVar[str] = "Sun et al., Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously, ECCV 2022"

    auxiliary_weight: float = setting(0.1, "weight of the other exits' losses in a branch")
    fusion_lr: float = setting(0.1, "learning rate of the fusion weights (Adam)")
    fuse_batchnorm: bool = setting(False, "learn the fusion of batch norm's scales and shifts too")

    _owners: dict[str, tuple[int, ...]] = field(init=False, repr=False, default_factory=dict)
    _learned: list[str] = field(init=False, repr=False, default_factory=list)
    _endpoints: list[dict[str, Tensor]] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.auxiliary_weight < 0:
            raise UserError(f"auxiliary_weight is {self.auxiliary_weight}; expected at least 0 (the paper's is 0.1)")
        if self.fusion_lr <= 0:
            raise UserError(f"fusion_lr is {self.fusion_lr}; expected above 0 (the paper's is 0.1)")

    def passes(self, exits: int) -> int:
        """Return K + 1: the branches and the fusion."""
        return exits + 1

    def prepare(self, run: Run) -> None:
        """Find out which exits own which parameter, and make the fusion weights."""
        self._owners = owners(run.network)
        self._endpoints = []
        fixed = set() if self.fuse_batchnorm else _batchnorm_parameters(run.network)
        self._learned = [name for name, exits in self._owners.items() if len(exits) > 1 and name not in fixed]
        weights = FusionWeights([self._owners[name] for name in self._learned], run.network.num_exits)
        weights.to(next(run.network.parameters()).dtype)
        run.auxiliary("fusion", weights, lambda parameters: torch.optim.Adam(parameters, lr=self.fusion_lr))

    def train_epoch(self, run: Run, batches: Iterable[Batch]) -> None:
        """Train the branches that are still to be trained this epoch, then fuse."""
        start = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
        for index in range(len(self._endpoints), run.network.num_exits):
            self._train_branch(run, batches, index)
            self._endpoints.append({name: run.network.get_parameter(name).detach().clone() for name in self._owners})
            _restart(run, start)
            run.checkpoint()
        self._fuse(run, batches)
        self._endpoints = []

    def _train_branch(self, run: Run, batches: Iterable[Batch], index: int) -> None:
        """Train all parameters for one pass, exit `index` counting fully and the others a little."""
        for batch in batches:
            losses = run.exit_losses(batch)
            emphasis = [1.0 if exit == index else self.auxiliary_weight for exit in range(len(losses))]
            weights = [a * b for a, b in zip(emphasis, run.exit_weights(), strict=True)]
            run.step(weighted_sum(losses, weights))

    def _fuse(self, run: Run, batches: Iterable[Batch]) -> None:
        """Learn the fusion weights for one pass, and give the network its fused parameters."""
        fusion = run.auxiliaries["fusion"]
        self._decay(run, fusion)
        stacks, fixed = self._stack()
        for batch in batches:
            losses = run.exit_losses(batch, parameters=fixed | _fused(fusion.module(), stacks))
            if stacks:  # with a single exit there is nothing to weigh, and the pass only settles batch norm
                fusion.step(weighted_sum(losses, run.exit_weights()))
        with torch.no_grad():
            for name, tensor in (fixed | _fused(fusion.module(), stacks)).items():
                run.network.get_parameter(name).copy_(tensor)

    def _decay(self, run: Run, fusion: Auxiliary) -> None:
        done = run.position.epoch / run.position.epochs
        for group in fusion.optimizer.param_groups:
            group["lr"] = self.fusion_lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))

    def _stack(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the end points [K, *shape] of each learned tensor, and the tensors that are fused once and for all.

        Those are owned by a single exit (its own end point), by none (unmoved, so equal in all branches), or are
        batch norm's: their mean over the owners.
        """
        stacks = {name: torch.stack([end[name] for end in self._endpoints]) for name in self._learned}
        everyone = range(len(self._endpoints))
        fixed = {
            name: torch.stack([self._endpoints[exit][name] for exit in exits or everyone]).mean(0)
            for name, exits in self._owners.items()
            if name not in stacks
        }
        return stacks, fixed

    def state_dict(self) -> dict[str, Any]:
        """Return the end points of the branches that this epoch has trained so far."""
        return {"endpoints": self._endpoints}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after those branches."""
        self._endpoints = list(state["endpoints"])


def _fused(weights: Tensor, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sum_e weights[p, e] W_e[p] for each parameter p, in the order of the rows of `weights` [T, K]."""
    rows = weights.unbind(0)
    return {
        name: torch.mv(stack.flatten(1).t(), row).view(stack.shape[1:])
        for (name, stack), row in zip(stacks.items(), rows, strict=True)
    }


def _restart(run: Run, start: Mapping[str, Tensor]) -> None:
    """Give the network the parameters and batch-norm statistics that the epoch began with, and clear the momentum."""
    run.network.load_state_dict(start)
    run.optimizer.state.clear()


def _batchnorm_parameters(network: MultiExitNetwork) -> set[str]:
    """Name the scales and shifts of all batch normalisations."""
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
