"""Meta-GF: train a branch for every exit, then learn how to fuse the branches parameter by parameter.

Paper: Sun et al., Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously, ECCV 2022, section 3 (algorithm 1),
https://www.ecva.net/papers/eccv_2022/papers_ECCV/html/6337_ECCV_2022_paper.php

Every epoch starts from W and has K + 1 passes over the data:

1. for each exit e, a branch: W_e = W trained for one pass on  CE_e + 0.1 sum_{j != e} CE_j  (W_e - W is the exit's
   *expected gradient*);
2. one pass that learns the fusion weights eta by Adam on  F(eta) = sum_j CE_j(W(eta)),  where every parameter tensor
   p is fused over the exits that own it (whose output depends on it):
   W(eta)[p] = sum_e softmax(eta_p)_e W_e[p];
3. W = W(eta), the fused end points themselves (a step of size 1 along the fused expected gradients).

The paper does not specify the following. Momentum is cleared, and batch-norm statistics are reset to those of W, before
every branch and before the fusion pass; all K + 1 passes of an epoch use the same images, augmented alike; eta starts
at 1, and its learning rate falls to a tenth at half and at three quarters of the schedule; batch norm's scales and
shifts are fused with equal weights (the paper's last section excludes batch norm) unless `fuse_batchnorm` is set. The
paper writes the update with a minus sign, although it defines the gradient as end point minus start; the sum above is
meant.

What differs from the published code: see `released/metagf.py`; `variant` selects one of its two drivers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from exitkit.methods.fusion import Fusion, Weighting
from exitkit.methods.joint import SDN_SHARES, sdn_ramp
from exitkit.methods.released.metagf import DRIVERS, Driver
from exitkit.networks import MultiExitNetwork, batchnorm_parameters, owners
from exitkit.strategy import (
    UPDATE,
    Batch,
    Branches,
    LearnedTable,
    Run,
    TrainingStrategy,
    UserError,
    resolve_variant,
    setting,
    weighted_sum,
)


def _of_driver(name: str) -> dict[str, Any]:
    return {variant: getattr(driver, name) for variant, driver in DRIVERS.items()}


@dataclass(eq=False)
class MetaGF(TrainingStrategy):
    """Meta-GF: in every epoch one training branch per exit, fused by learned weights.

    Sun et al., ECCV 2022, https://www.ecva.net/papers/eccv_2022/papers_ECCV/html/6337_ECCV_2022_paper.php

    With W_e the end point of branch e and E(p) the exits that own parameter tensor p:
    W(eta)[p] = sum_{e in E(p)} softmax(eta_p)_e W_e[p], eta_p [K]; eta minimises sum_j CE_j(W(eta)).

    Example:
        >>> exitkit.build_strategy("metagf", auxiliary_weight=0.1).passes(exits=4)
        5
    """

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})
    whole_epochs: ClassVar[bool] = True
    paper: ClassVar[str] = "Sun et al., Meta-GF: Training Dynamic-Depth Neural Networks Harmoniously, ECCV 2022"

    variant: Literal["paper", "released", "released-channel"] = setting(
        "paper", "follow the paper, or the released layer-wise or channel-wise driver"
    )
    auxiliary_weight: float = setting(0.1, "weight of the other exits' losses in a branch", search=(0.01, 1.0, "log"))
    fusion_lr: float = setting(0.1, "learning rate of the fusion weights (Adam)")
    fuse_batchnorm: bool | None = setting(
        None, "also learn the fusion of batch norm's scales and shifts", variant=_of_driver("fuse_batchnorm")
    )
    weighting: Weighting | None = setting(
        None, "function from eta to weights that sum to 1", variant=_of_driver("weighting")
    )
    fusion_temperature: float | None = setting(None, "factor of eta", variant=_of_driver("fusion_temperature"))
    granularity: Literal["tensor", "channel"] | None = setting(
        None, "one weight per parameter tensor, or one per output channel", variant=_of_driver("granularity")
    )
    ema: float | None = setting(None, "weight of the previous eta after an epoch", variant=_of_driver("ema"))
    learn: Literal["always", "first"] | None = setting(
        None, "learn eta in every epoch, or in the first epoch only", variant=_of_driver("learn")
    )
    clean: bool | None = setting(
        None, "reset momentum and batch-norm statistics before every branch", variant=_of_driver("clean")
    )
    branches: Literal["one-by-one", "side-by-side"] = setting(
        "one-by-one", "train the branches in turn, or at once with K times the memory; same results", execution=True
    )

    _driver: Driver = field(init=False, repr=False)
    _branches: Branches = field(init=False, repr=False)
    _fusion: Fusion = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        self._driver = DRIVERS[self.variant]
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
                f"variant={self.variant} keeps momentum and statistics from branch to branch, which is not possible "
                "side by side; expected branches=one-by-one, or clean=true"
            )
        self._branches = Branches(self.branches == "side-by-side", bool(self.clean))

    def adapt(self, network: MultiExitNetwork) -> None:
        """Check that the released drivers support the number of exits; the network does not change."""
        if self.variant != "paper" and network.num_exits > len(SDN_SHARES) + 1:
            raise UserError(f"variant={self.variant} is for up to 7 exits; the network has {network.num_exits}")

    def passes(self, exits: int) -> int:
        """Return K + 1: the branches and the fusion."""
        return exits + 1

    def refuses(self) -> Mapping[str, str]:
        """Refuse averages of the weights, and side by side other optimisers than SGD."""
        average = {"weight_ema": "the fusion, not the optimiser, makes the weights of an epoch"}
        if self.branches == "one-by-one":
            return average
        return average | {"optimizer": "branches train side by side by SGD only; expected branches=one-by-one"}

    def prepare(self, run: Run) -> None:
        """Determine the owners of each parameter, and make the fusion weights."""
        if self.variant != "paper" and run.network.family == "ranet":
            raise UserError(
                f"variant is {self.variant}, and none was released for ranet networks; expected variant=paper"
            )
        owned_by = owners(run.network)
        equal = set() if self.fuse_batchnorm else batchnorm_parameters(run.network)
        learned = [name for name, exits in owned_by.items() if len(exits) > 1 and name not in equal]
        by_channel = self.granularity == "channel"
        shapes = {name: run.network.get_parameter(name).shape for name in learned}
        rows = {name: shape[0] if by_channel and shape else 1 for name, shape in shapes.items()}
        self._fusion = Fusion(run.network.num_exits, owned_by, rows)
        assert self.weighting is not None and self.fusion_temperature is not None  # set by the variant
        weights = self._fusion.weights(self.weighting, self.fusion_temperature, self._driver.last_eta)
        weights.to(next(run.network.parameters()).dtype)
        run.auxiliary("fusion", weights, lambda parameters: torch.optim.Adam(parameters, lr=self.fusion_lr))
        self._branches.end_epoch()
        self._branches.rehearse(run, self._emphasis(run))

    def train_epoch(self, run: Run, batches: Iterable[Batch]) -> None:
        """Train the remaining branches, learn the fusion, and load the fused parameters."""
        endpoints = self._branches.train(run, batches, self._emphasis(run))
        fused = self._learn_fusion(run, batches, endpoints)
        with torch.no_grad():
            for name, tensor in fused.items():
                run.network.get_parameter(name).copy_(tensor)
        self._branches.end_epoch()

    def _emphasis(self, run: Run) -> list[list[float]]:
        """Return a [K, K]: the weight of exit j in branch e."""
        exits = range(run.network.num_exits)
        factors = self._driver.others or (1.0,) * len(exits)
        emphasis = [[1.0 if j == e else self.auxiliary_weight * factors[j] for j in exits] for e in exits]
        if self._driver.ramp and run.network.family.startswith("sdn"):
            ramp = sdn_ramp(run.position.epoch, run.position.epochs, len(exits))
            emphasis = [[ramp[e] * factor for factor in row] for e, row in enumerate(emphasis)]
        return emphasis

    def _learn_fusion(
        self, run: Run, batches: Iterable[Batch], endpoints: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Learn eta for one pass, and return the fused parameters by name."""
        fusion = run.auxiliaries["fusion"]
        eta = next(fusion.module.parameters())
        before = eta.detach().clone()
        done = run.position.epoch / run.position.epochs
        for group in fusion.optimizer.param_groups:
            group["lr"] = self.fusion_lr * 0.1 ** sum(done >= drop for drop in self._driver.drops)
        stacks, fixed = self._fusion.stack(endpoints)
        # With one exit there is nothing to learn, and the pass only updates batch-norm statistics.
        learns = bool(stacks) and (self.learn == "always" or run.position.epoch == 0)
        applied: dict[str, Tensor] = {}
        for batch in batches:
            applied = fixed | self._fusion.fuse(fusion.module(), stacks)
            losses = run.losses(batch, parameters=applied)
            if learns:
                fusion.step(weighted_sum(losses, self._fusion_weights(run)))
        with torch.no_grad():
            if self._driver.keeps_last_step or not applied:
                applied = fixed | self._fusion.fuse(fusion.module(), stacks)
            if self.ema:
                eta.lerp_(before, self.ema)
        return applied

    def _fusion_weights(self, run: Run) -> list[float]:
        """Return the weights of the exits in the fusion pass."""
        if not self._driver.ramp:
            return list(run.weights())
        ramp = sdn_ramp(run.position.epoch, run.position.epochs, run.network.num_exits)
        return [a * b for a, b in zip(ramp, run.weights(), strict=True)]

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return each exit's weight in each layer: the mean over its tensors and channels."""
        with torch.no_grad():
            return self._fusion.tables(run.auxiliaries["fusion"].module())

    def state_dict(self) -> dict[str, Any]:
        """Return the end points of the branches that are finished in this epoch."""
        return self._branches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore these end points, so that training resumes after them."""
        self._branches.load_state_dict(state)
