"""Gradient aggregators: every exit's own gradient, and one direction made of them.

Paper: each class names its own. All read the matrix G [K, D] whose row k is the gradient of exit k's loss over all
parameters, zero where exit k reads none, and give one direction [D] for the optimiser. The exits' gradients come from a
plain loop, each walking only the stages below its exit; the aggregators are torchjd's.

PCGrad and CAGrad are the rivals in Meta-GF (Sun et al., ECCV 2022), whose compiled files are all that is published of
its comparison. What differs from them, and is to be had by `variant = "released"`: PCGrad there may also project a
changed gradient off its own original, and takes the mean over the exits of a parameter that all of them read, but the
sum of any other; ours takes the mean over the exits that read it. CAGrad there finds its weights by 21 evaluations of
gradient descent instead of a convex solver, and divides the result by 1 + c^2. Learning rates there are unknown.

PCGrad, IMTL-G, MGDA and CAGrad give directions of the size of one exit's gradient, others of that of the sum of all:
a rate that suits joint training need not suit them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torchjd import aggregation

from exitkit.errors import UserError
from exitkit.plugins import setting
from exitkit.strategy import UPDATE, TrainingStrategy, Variant

if TYPE_CHECKING:
    from exitkit.data.base import Batch
    from exitkit.run import Run


@dataclass(eq=False)
class Aggregated(TrainingStrategy):
    """A step along what an aggregator makes of the exits' gradients."""

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's aggregator for K exits."""
        raise TypeError(f"{type(self).__name__} has to name its aggregator")

    def train_step(self, run: Run, batch: Batch) -> None:
        """Step along the direction that the exits' gradients give."""
        pairs = zip(run.exit_losses(batch), run.exit_weights(), strict=True)
        rows = run.exit_gradients([weight * loss for loss, weight in pairs if weight != 0])
        if not rows:
            raise UserError("every exit's weight is zero, so that there is nothing to train on")
        sizes = [parameter.numel() for parameter in run.parameters]
        matrix = torch.stack([torch.cat(list(map(_flat, row, run.parameters))) for row in rows])
        # A gradient that overflowed (fp16) is no matter for a solver: the engine leaves such a step out.
        finite = bool(matrix.isfinite().all())
        direction = self.combine(run, matrix) if finite else matrix.sum(0)
        pieces = zip(direction.split(sizes), run.parameters, zip(*rows, strict=True), strict=True)
        run.apply(
            self.scale(sum(g is not None for g in column), len(rows)) * piece.view_as(parameter)
            if any(g is not None for g in column)
            else None
            for piece, parameter, column in pieces
        )

    def combine(self, run: Run, matrix: Tensor) -> Tensor:
        """Return the direction [D] for the exits' gradients [K, D]; the same on all ranks."""
        with run.seeded("aggregate"):
            direction: Tensor = self.aggregator(len(matrix))(matrix)
        return direction

    def scale(self, readers: int, exits: int) -> float:
        """Return the factor of a parameter's direction that `readers` of the exits read."""
        return 1.0


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()


@dataclass(eq=False)
class PCGrad(Aggregated):
    """PCGrad: every exit's gradient loses what contradicts another exit's."""

    paper: ClassVar[str] = "Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020"

    variant: Variant = setting("paper", "mean over the exits that read a parameter, or Meta-GF's compiled rival")

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's PCGrad: the sum of the projected gradients."""
        return aggregation.PCGrad()

    def combine(self, run: Run, matrix: Tensor) -> Tensor:
        """Return the sum of the projected gradients."""
        if self.variant == "paper":
            return super().combine(run, matrix)
        return _released_projections(matrix @ matrix.t(), run.rng("aggregate")) @ matrix

    def scale(self, readers: int, exits: int) -> float:
        """Return 1 over the readers; released: only where all exits read it."""
        return 1 / readers if self.variant == "paper" or readers == exits else 1.0


def _released_projections(gramian: Tensor, generator: torch.Generator) -> Tensor:
    """Return how much of each exit's gradient the sum of the projected ones holds, [K].

    For every exit, all originals in random order, its own among them: where the product is negative, that is taken off.
    """
    dots = gramian.double().cpu()
    exits = len(dots)
    mixed = torch.eye(exits, dtype=torch.float64)
    for row in mixed:
        for other in torch.randperm(exits, generator=generator).tolist():
            product = dots[other] @ row
            if product < 0:
                row[other] -= product / dots[other, other]
    return mixed.sum(0).to(gramian)


@dataclass(eq=False)
class CAGrad(Aggregated):
    """CAGrad: near the mean gradient, the direction that helps the worst-off exit most."""

    paper: ClassVar[str] = "Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021"

    variant: Variant = setting("paper", "convex solver, or the 21 steps of Meta-GF's compiled rival")
    c: float = setting(0.5, "how far from the mean gradient, in its lengths")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.c >= 0 and math.isfinite(self.c)):
            raise UserError(f"c is {self.c}; expected at least 0 (the papers' is 0.5)")

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's CAGrad."""
        return aggregation.CAGrad(self.c)

    def combine(self, run: Run, matrix: Tensor) -> Tensor:
        """Return the mean gradient, moved towards the worst-off exit."""
        if self.variant == "paper":
            return super().combine(run, matrix)
        return _released_weights(matrix @ matrix.t(), self.c) @ matrix


@torch.enable_grad()
def _released_weights(gramian: Tensor, c: float) -> Tensor:
    """Return  (1/K + lambda w) / (1 + c^2)  by stochastic gradient descent on  g_w . g_mean + c |g_mean| |g_w|."""
    dots = gramian.detach().double().cpu()
    dots = dots / (dots.diagonal() + 1e-4).sqrt().mean() ** 2
    to_mean = dots.mean(1)
    radius = c * (to_mean.mean() + 1e-4).sqrt()
    scores = torch.zeros(len(dots), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=25, momentum=0.5)
    best, lowest = scores.detach().clone(), math.inf
    for _ in range(21):
        w = scores.softmax(0)
        value = w @ to_mean + radius * (w @ dots @ w + 1e-4).sqrt()
        if value.item() < lowest:
            best, lowest = scores.detach().clone(), value.item()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    w = best.softmax(0)
    reach = radius / ((w @ dots @ w + 1e-4).sqrt() + 1e-4)
    return ((1 / len(dots) + reach * w) / (1 + c**2)).to(gramian)


@dataclass(eq=False)
class MGDA(Aggregated):
    """MGDA: the shortest vector between the exits' gradients."""

    paper: ClassVar[str] = "Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018"

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's MGDA."""
        return aggregation.MGDA()


@dataclass(eq=False)
class IMTLG(Aggregated):
    """IMTL-G: the direction with equal projections on all exits' gradients."""

    paper: ClassVar[str] = "Liu et al., Towards Impartial Multi-task Learning, ICLR 2021"

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's IMTL-G."""
        return aggregation.IMTLG()


@dataclass(eq=False)
class AlignedMTL(Aggregated):
    """Aligned-MTL: the exits' gradients made orthogonal and equally long first."""

    paper: ClassVar[str] = "Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023"

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's Aligned-MTL."""
        return aggregation.AlignedMTL()


@dataclass(eq=False)
class GradDrop(Aggregated):
    """GradDrop: where signs differ, one sign is drawn, and the gradients of the other are dropped."""

    paper: ClassVar[str] = "Chen et al., Just Pick a Sign: Gradient Sign Dropout, NeurIPS 2020"

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's GradDrop."""
        return aggregation.GradDrop()


@dataclass(eq=False)
class UPGrad(Aggregated):
    """UPGrad: every exit's gradient brought to where it contradicts none, then summed up."""

    paper: ClassVar[str] = "Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024"

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's UPGrad."""
        return aggregation.UPGrad()


@dataclass(eq=False)
class DualProj(Aggregated):
    """DualProj: the mean gradient brought to where it contradicts no exit's."""

    paper: ClassVar[str] = "Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017"

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's DualProj."""
        return aggregation.DualProj()


@dataclass(eq=False)
class ConFIG(Aggregated):
    """ConFIG: the direction at equal angles to all exits' gradients."""

    paper: ClassVar[str] = "Liu et al., ConFIG: Conflict-free Training of Physics Informed Neural Networks, 2024"

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's ConFIG."""
        return aggregation.ConFIG()


@dataclass(eq=False)
class NashMTL(Aggregated):
    """Nash-MTL: the exits bargain about the direction; each step begins at the bargain of the one before."""

    paper: ClassVar[str] = "Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022"

    max_norm: float = setting(1.0, "longest direction; 0: no limit")

    _bargain: aggregation.NashMTL | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.max_norm >= 0 and math.isfinite(self.max_norm)):
            raise UserError(f"max_norm is {self.max_norm}; expected at least 0")
        try:
            aggregation.NashMTL(2)
        except ImportError:
            raise UserError("nashmtl needs a solver that is not here; pip install 'exitkit[nashmtl]'") from None

    def prepare(self, run: Run) -> None:
        """Begin without a bargain."""
        self._bargain = None

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's Nash-MTL, which remembers its last bargain."""
        if self._bargain is None:
            self._bargain = aggregation.NashMTL(exits, self.max_norm)
        return self._bargain

    def combine(self, run: Run, matrix: Tensor) -> Tensor:
        """Return the bargain's direction."""
        with warnings.catch_warnings():  # its solver's, about speed
            warnings.simplefilter("ignore", UserWarning)
            return super().combine(run, matrix)

    def state_dict(self) -> dict[str, Any]:
        """Return the last bargain."""
        return {} if self._bargain is None else {"bargain": torch.as_tensor(self._bargain.weighting.prvs_alpha)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        self._bargain = None
        if state:
            bargain = self.aggregator(len(state["bargain"]))
            assert isinstance(bargain, aggregation.NashMTL)
            bargain.weighting.prvs_alpha = state["bargain"].cpu().numpy()
