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

What differs from the published code, and is to be had by `variant`. Its layer-wise driver (`released`; MSDNet, ResNet)
weighs by sigmoid(eta) normalised over the owners, learns eta in the first epoch only (a tensor is re-bound), and
averages it with its old values (0.9). Its channel-wise driver (`released-channel`; VGG) has a weight an output channel,
softmax(0.1 eta), with the last exit's eta starting at 5, averaged a little (0.1). Both let momentum and batch-norm
statistics leak from branch to branch, multiply the other exits' losses by numbers of their own (for up to 7 exits), use
the ramp of SDN in the fusion pass (and, on SDN networks, in the branches), fuse batch norm like all else, and give the
network the weights of the last batch before its step. Their rate of eta never falls (layer-wise) or falls once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.errors import UserError
from exitkit.gradients import owners
from exitkit.methods.joint import SDN_SHARES, sdn_ramp
from exitkit.plugins import resolve_variant, setting
from exitkit.strategy import UPDATE, LearnedTable, TrainingStrategy, weighted_sum

if TYPE_CHECKING:
    from exitkit.auxiliary import Auxiliary
    from exitkit.data.base import Batch
    from exitkit.network import MultiExitNetwork
    from exitkit.run import Run


Driver = Literal["paper", "released", "released-channel"]
Weighting = Literal["softmax", "sigmoid"]
Branches = Literal["one-by-one", "side-by-side"]

_OTHERS = {
    "released": (1.0, 1.0, 0.6, 0.6, 0.75, 0.9, 1.0),
    "released-channel": (3.0, 0.6, 0.45, 0.6, 0.75, 0.9, 1.0),
}
"""By how much the released drivers multiply `auxiliary_weight` for each exit."""


def _variants(paper: Any, released: Any, channel: Any) -> dict[str, Any]:
    return {"paper": paper, "released": released, "released-channel": channel}


class FusionWeights(nn.Module):
    """eta: one number a row and exit; a row is a parameter tensor, or one output channel of it.

    Args:
        owned_by: the exits that own each of the R rows.
        exits: K.
        weighting: `softmax` of temperature * eta over the owners, or `sigmoid` of it normalised over them.
        temperature: see above.
        last: what the last exit's eta starts at; the others start at 1.
    """

    def __init__(
        self,
        owned_by: Sequence[Sequence[int]],
        exits: int,
        weighting: Weighting = "softmax",
        temperature: float = 1.0,
        last: float = 1.0,
    ) -> None:
        super().__init__()
        owns = torch.zeros(len(owned_by), exits, dtype=torch.bool)
        for row, owning in enumerate(owned_by):
            owns[row, list(owning)] = True
        eta = torch.ones(len(owned_by), exits)
        eta[:, -1] = last
        self.weighting, self.temperature = weighting, temperature
        self.eta = nn.Parameter(eta)
        self.owns: Tensor
        self.register_buffer("owns", owns)

    def forward(self) -> Tensor:
        """Return the weights [R, K]: they sum to 1 over each row's owners, and are 0 for other exits."""
        scaled = self.temperature * self.eta
        if self.weighting == "softmax":
            return scaled.masked_fill(~self.owns, -torch.inf).softmax(1)
        strength = scaled.sigmoid() * self.owns
        return strength / strength.sum(1, keepdim=True)


@dataclass(eq=False)
class MetaGF(TrainingStrategy):
    """Meta-GF: one branch of training an exit, fused by learned weights, every epoch."""

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})
    paper: ClassVar[str] = "Sun et al., Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously, ECCV 2022"

    variant: Driver = setting("paper", "follow the paper, or the released layer-wise or channel-wise driver")
    auxiliary_weight: float = setting(0.1, "weight of the other exits' losses in a branch")
    fusion_lr: float = setting(0.1, "learning rate of the fusion weights (Adam)")
    fuse_batchnorm: bool | None = setting(
        None, "learn the fusion of batch norm's scales and shifts too", variant=_variants(False, True, True)
    )
    weighting: Weighting | None = setting(
        None, "how numbers become weights that sum to 1", variant=_variants("softmax", "sigmoid", "softmax")
    )
    fusion_temperature: float | None = setting(None, "factor of those numbers", variant=_variants(1.0, 1.0, 0.1))
    granularity: Literal["tensor", "channel"] | None = setting(
        None,
        "one weight a parameter tensor, or one an output channel",
        variant=_variants("tensor", "tensor", "channel"),
    )
    ema: float | None = setting(None, "share of the old weights kept after an epoch", variant=_variants(0.0, 0.9, 0.1))
    learn: Literal["always", "first"] | None = setting(
        None, "learn the weights in every epoch or in the first alone", variant=_variants("always", "first", "always")
    )
    clean: bool | None = setting(
        None, "no momentum and statistics from one branch in the next", variant=_variants(True, False, False)
    )
    branches: Branches = setting(
        "one-by-one", "train the branches in turn, or at once in K times the memory; same results", execution=True
    )

    _owners: dict[str, tuple[int, ...]] = field(init=False, repr=False, default_factory=dict)
    _rows: dict[str, int] = field(init=False, repr=False, default_factory=dict)
    _endpoints: list[dict[str, Tensor]] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        if self.auxiliary_weight < 0:
            raise UserError(f"auxiliary_weight is {self.auxiliary_weight}; expected at least 0 (the paper's is 0.1)")
        if self.fusion_lr <= 0:
            raise UserError(f"fusion_lr is {self.fusion_lr}; expected above 0 (the paper's is 0.1)")
        assert self.ema is not None and self.fusion_temperature is not None  # set by the variant
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}; expected a share of at least 0 and below 1")
        if self.fusion_temperature <= 0:
            raise UserError(f"fusion_temperature is {self.fusion_temperature}; expected above 0")
        if self.branches == "side-by-side" and not self.clean:
            raise UserError(
                f"variant={self.variant} hands momentum and statistics from branch to branch, which can't be done "
                "side-by-side; expected branches=one-by-one, or clean=true"
            )

    def adapt(self, network: MultiExitNetwork) -> None:
        """Check that the released drivers' lists are long enough; the network stays as it is."""
        if self.variant != "paper" and network.num_exits > len(SDN_SHARES) + 1:
            raise UserError(f"variant={self.variant} is for up to 7 exits; the network has {network.num_exits}")

    def passes(self, exits: int) -> int:
        """Return K + 1: the branches and the fusion."""
        return exits + 1

    def prepare(self, run: Run) -> None:
        """Find out which exits own which parameter, and make the fusion weights."""
        self._owners = owners(run.network)
        self._endpoints = []
        fixed = set() if self.fuse_batchnorm else _batchnorm_parameters(run.network)
        learned = [name for name, exits in self._owners.items() if len(exits) > 1 and name not in fixed]
        by_channel = self.granularity == "channel"
        self._rows = {name: len(run.network.get_parameter(name)) if by_channel else 1 for name in learned}
        owned_by = [self._owners[name] for name, rows in self._rows.items() for _ in range(rows)]
        assert self.weighting is not None and self.fusion_temperature is not None  # set by the variant
        last = 5.0 if self.variant == "released-channel" else 1.0
        weights = FusionWeights(owned_by, run.network.num_exits, self.weighting, self.fusion_temperature, last)
        weights.to(next(run.network.parameters()).dtype)
        run.auxiliary("fusion", weights, lambda parameters: torch.optim.Adam(parameters, lr=self.fusion_lr))
        if self.branches == "side-by-side":
            run.replicas([self._emphasis(run, index) for index in range(run.network.num_exits)]).rehearse()

    def train_epoch(self, run: Run, batches: Iterable[Batch]) -> None:
        """Train the branches that are still to be trained this epoch, then fuse."""
        missing = range(len(self._endpoints), run.network.num_exits)
        if self.branches == "side-by-side" and missing:
            self._train_side_by_side(run, batches, missing)
        else:
            self._train_in_turn(run, batches, missing)
        self._fuse(run, batches)
        self._endpoints = []

    def _train_in_turn(self, run: Run, batches: Iterable[Batch], branches: Iterable[int]) -> None:
        """Train branch after branch, each from the start of the epoch."""
        start = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
        for index in branches:
            self._train_branch(run, batches, index)
            self._endpoints.append({name: run.network.get_parameter(name).detach().clone() for name in self._owners})
            self._restart(run, start)
            run.checkpoint()

    def _train_side_by_side(self, run: Run, batches: Iterable[Batch], branches: Iterable[int]) -> None:
        """Train all branches in one pass, with one checkpoint after it."""
        replicas = run.replicas([self._emphasis(run, index) for index in branches])
        for batch in batches:
            replicas.step(batch)
        self._endpoints += [{name: state[name] for name in self._owners} for state in replicas.states()]
        run.checkpoint()

    def _train_branch(self, run: Run, batches: Iterable[Batch], index: int) -> None:
        """Train all parameters for one pass, exit `index` counting fully and the others a little."""
        emphasis = self._emphasis(run, index)
        for batch in batches:
            weights = [a * b for a, b in zip(emphasis, run.exit_weights(), strict=True)]
            run.step(weighted_sum(run.exit_losses(batch), weights))

    def _emphasis(self, run: Run, index: int) -> list[float]:
        """Return how much each exit counts in branch `index`."""
        exits = run.network.num_exits
        others = _OTHERS.get(self.variant, (1.0,) * exits)
        emphasis = [1.0 if exit == index else self.auxiliary_weight * others[exit] for exit in range(exits)]
        if self.variant != "paper" and run.network.family.startswith("sdn"):
            strength = sdn_ramp(run.position.epoch, run.position.epochs, exits)[index]
            emphasis = [strength * weight for weight in emphasis]
        return emphasis

    def _fuse(self, run: Run, batches: Iterable[Batch]) -> None:
        """Learn the fusion weights for one pass, and give the network its fused parameters."""
        fusion = run.auxiliaries["fusion"]
        eta = next(fusion.module.parameters())
        before = eta.detach().clone()
        self._decay(run, fusion)
        stacks, fixed = self._stack()
        # With a single exit there is nothing to weigh, and the pass only settles batch norm.
        learns = bool(stacks) and (self.learn == "always" or run.position.epoch == 0)
        applied: dict[str, Tensor] = {}
        for batch in batches:
            applied = fixed | self._fused(fusion, stacks)
            losses = run.exit_losses(batch, parameters=applied)
            if learns:
                fusion.step(weighted_sum(losses, self._fusion_emphasis(run)))
        with torch.no_grad():
            if self.variant == "paper" or not applied:
                applied = fixed | self._fused(fusion, stacks)
            for name, tensor in applied.items():
                run.network.get_parameter(name).copy_(tensor)
            if self.ema:
                eta.lerp_(before, self.ema)

    def _fusion_emphasis(self, run: Run) -> list[float]:
        """Return how much each exit counts in the fusion pass."""
        if self.variant == "paper":
            return list(run.exit_weights())
        ramp = sdn_ramp(run.position.epoch, run.position.epochs, run.network.num_exits)
        return [a * b for a, b in zip(ramp, run.exit_weights(), strict=True)]

    def _decay(self, run: Run, fusion: Auxiliary) -> None:
        done = run.position.epoch / run.position.epochs
        drops = {"paper": (0.5, 0.75), "released-channel": (0.5,)}.get(self.variant, ())
        for group in fusion.optimizer.param_groups:
            group["lr"] = self.fusion_lr * 0.1 ** sum(done >= drop for drop in drops)

    def _fused(self, fusion: Auxiliary, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sum_e weights[row, e] W_e[p] for each parameter p, or channel by channel of it."""
        pieces = fusion.module().split([self._rows[name] for name in stacks])
        fused = {}
        for (name, stack), weights in zip(stacks.items(), pieces, strict=True):
            if len(weights) == 1:
                flat = torch.mv(stack.flatten(1).t(), weights[0])
            else:
                flat = (stack.reshape(*stack.shape[:2], -1) * weights.t().unsqueeze(2)).sum(0)
            fused[name] = flat.view(stack.shape[1:])
        return fused

    def _restart(self, run: Run, start: Mapping[str, Tensor]) -> None:
        """Give the network what the epoch began with; clean, that is batch norm's statistics and no momentum, too."""
        if self.clean:
            run.network.load_state_dict(start)
            run.optimizer.state.clear()
            return
        with torch.no_grad():
            for name, parameter in run.network.named_parameters():
                parameter.copy_(start[name])

    def _stack(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the end points [K, *shape] of each learned tensor, and the tensors that are fused once and for all.

        Those are owned by a single exit (its own end point), by none (unmoved, so equal in all branches), or are
        batch norm's: their mean over the owners.
        """
        stacks = {name: torch.stack([end[name] for end in self._endpoints]) for name in self._rows}
        everyone = range(len(self._endpoints))
        fixed = {
            name: torch.stack([self._endpoints[exit][name] for exit in exits or everyone]).mean(0)
            for name, exits in self._owners.items()
            if name not in stacks
        }
        return stacks, fixed

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return each exit's weight in each layer: the mean over its tensors and channels."""
        with torch.no_grad():
            weights = run.auxiliaries["fusion"].module()
        layers: dict[str, list[Tensor]] = {}
        for name, piece in zip(self._rows, weights.split(list(self._rows.values())), strict=True):
            owned = torch.tensor([exit in self._owners[name] for exit in range(run.network.num_exits)])
            mean = piece.mean(0).cpu().masked_fill(~owned, torch.nan)
            layers.setdefault(name.rpartition(".")[0], []).append(mean)
        means = [torch.stack(tensors).nanmean(0).tolist() for tensors in layers.values()]
        values = [[None if value != value else value for value in row] for row in means]
        exits = [f"exit {number}" for number in range(1, run.network.num_exits + 1)]
        return [LearnedTable("fusion weights, layer by layer", list(layers), exits, values)] if layers else []

    def state_dict(self) -> dict[str, Any]:
        """Return the end points of the branches that this epoch has trained so far."""
        return {"endpoints": self._endpoints}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after those branches."""
        self._endpoints = list(state["endpoints"])


def _batchnorm_parameters(network: MultiExitNetwork) -> set[str]:
    """Name the scales and shifts of all batch normalisations."""
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
