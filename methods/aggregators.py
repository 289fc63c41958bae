"""Gradient aggregators: combine the exits' gradients into one update.

Papers: see each method. The input is the matrix G [K, D], whose row k is the gradient of exit k's loss with respect to
all parameters, zero for parameters that exit k does not read; the result is one direction [D] for the optimiser. The
exits are differentiated in a loop, in which each backward pass covers only the stages before the exit; the aggregators
are torchjd's.

The length of the direction depends on the method, so that the learning rate of joint training may not suit an
aggregator. For K equal gradients g the direction is, as measured by the tests,

    g            pcgrad, mgda, imtlg, aligned, upgrad, dualproj     (a mean)
    (1 + c) g    cagrad
    K g          graddrop, config, and joint training               (a sum)
    K g, shortened to the length `max_norm` if it is longer        nashmtl

`size = "sum"` multiplies the means by K; of pcgrad, by the number of exits that read the parameter.

What differs from the published code: PCGrad takes the mean over the exits that read a parameter; all other differences
are documented by torchjd. `variant = "released"` of PCGrad and CAGrad is Meta-GF's implementation of them
(`released/aggregators.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchjd import aggregation

from exitkit.methods.released.aggregators import descent_weights, projection_weights
from exitkit.strategy import UPDATE, Batch, Run, TrainingStrategy, UserError, Variant, setting


@dataclass(eq=False)
class Aggregated(TrainingStrategy):
    """Base class of the aggregators: a step along the direction that combines the exits' gradients.

    Class attributes:
        is_mean: whether the direction has the length of a mean of the gradients; False: of a sum.
        make: returns torchjd's aggregator.
    """

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})
    is_mean: ClassVar[bool] = True
    make: ClassVar[Callable[[], aggregation.Aggregator]]

    size: Literal["default", "sum"] = setting(
        "default",
        "length of the direction: that of the method (see its page), or that of a sum over the exits",
        kw_only=True,
        added=True,
    )

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return the settings without effect: the size, for a direction that is not a mean."""
        size = {} if self.is_mean else {"size": "a direction that has the length of a mean"}
        return super().unused_settings(yielded) | size

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's aggregator for K exits."""
        return type(self).make()

    def train_step(self, run: Run, batch: Batch) -> None:
        """Step along the direction that combines the exits' gradients."""
        pairs = zip(run.losses(batch), run.weights(), strict=True)
        weighted = [weight * loss for loss, weight in pairs if weight != 0]
        if not weighted:
            raise UserError("the weights of all exits are zero; expected at least one above zero")
        trained = [loss for loss in weighted if loss.requires_grad]
        if not trained:
            raise UserError("the exits with a weight above zero have frozen parameters only; expected one to train")
        # A row of zeros, from an exit whose parameters are all frozen, would be a direction that conflicts with none.
        rows = run.exit_gradients(trained)
        sizes = [parameter.numel() for parameter in run.parameters]
        matrix = torch.stack([torch.cat(list(map(_flat, row, run.parameters))) for row in rows])
        # A solver can't use a gradient that overflowed (fp16); the engine skips such a step.
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
        """Return the direction [D] for the exits' gradients [K, D]; it is the same on all ranks."""
        with run.seeded("aggregate"):
            direction: Tensor = self.aggregator(len(matrix))(matrix)
        return direction

    def scale(self, readers: int, exits: int) -> float:
        """Return the factor of the direction of a parameter that `readers` of the exits read."""
        return float(exits) if self.size == "sum" and self.is_mean else 1.0


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.flatten()


@dataclass(eq=False)
class PCGrad(Aggregated):
    """PCGrad: project each exit's gradient so that it does not conflict with another's.

    Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, https://arxiv.org/abs/2001.06782

    d_p = 1/K_p sum_k h_kp for each parameter p, which K_p exits read; h_k [D] starts as g_k, and for the other exits j
    in random order  h_k <- h_k - min(<h_k, g_j>, 0) / <g_j, g_j> g_j.

    Example:
        >>> exitkit.build_strategy("pcgrad", size="sum").scale(readers=4, exits=4)
        1.0
    """

    paper: ClassVar[str] = "Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020"
    make: ClassVar[Callable[[], aggregation.Aggregator]] = aggregation.PCGrad

    variant: Variant = setting(
        "paper", "mean over the exits that read a parameter, or the released code of Meta-GF's comparison"
    )

    def combine(self, run: Run, matrix: Tensor) -> Tensor:
        """Return the sum of the projected gradients."""
        if self.variant == "paper":
            return super().combine(run, matrix)
        return projection_weights(matrix @ matrix.t(), run.rng("aggregate")) @ matrix

    def scale(self, readers: int, exits: int) -> float:
        """Return 1 / `readers`; for the released variant only if all exits read the parameter, else 1."""
        if self.size == "sum":
            return 1.0
        return 1 / readers if self.variant == "paper" or readers == exits else 1.0


@dataclass(eq=False)
class CAGrad(Aggregated):
    """CAGrad: the direction near the mean gradient that improves the worst exit most.

    Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, https://arxiv.org/abs/2110.14048

    d [D] = argmax_d min_k <g_k, d> subject to |d - g| <= c |g|, with g = 1/K sum_k g_k [D].

    Example:
        >>> exitkit.build_strategy("cagrad", c=0.4).c
        0.4
    """

    paper: ClassVar[str] = "Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021"

    variant: Variant = setting("paper", "convex solver, or gradient descent as in the code of Meta-GF's comparison")
    c: float = setting(0.5, "largest distance from the mean gradient, as a multiple of its length", search=(0.1, 0.9))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.c >= 0 and math.isfinite(self.c)):
            raise UserError(f"c is {self.c}; expected at least 0 (the papers' is 0.5)")

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's CAGrad."""
        return aggregation.CAGrad(self.c)

    def combine(self, run: Run, matrix: Tensor) -> Tensor:
        """Return the direction of CAGrad."""
        if self.variant == "paper":
            return super().combine(run, matrix)
        return descent_weights(matrix @ matrix.t(), self.c) @ matrix


def wrapped(name: str, make: Callable[[], aggregation.Aggregator], paper: str, doc: str, *, is_mean: bool) -> Any:
    """Return a method that combines the exits' gradients by one of torchjd's aggregators.

    Args:
        name: the class's name.
        make: returns the aggregator.
        paper: authors, title, venue and year.
        doc: the class's documentation: summary, link, formula, example.
        is_mean: see `Aggregated`.
    """
    parts = {"__doc__": doc, "__module__": __name__, "make": staticmethod(make), "paper": paper, "is_mean": is_mean}
    return dataclass(eq=False)(type(name, (Aggregated,), parts))


MGDA = wrapped(
    "MGDA",
    aggregation.MGDA,
    "Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018",
    """MGDA: the shortest vector in the convex hull of the exits' gradients.

    Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018,
    https://arxiv.org/abs/1810.04650

    d [D] = G^T a, with a [K] = argmin |G^T a| over a >= 0, sum_k a_k = 1.

    Example:
        >>> exitkit.build_strategy("mgda").scale(readers=4, exits=4)
        1.0
    """,
    is_mean=True,
)
IMTLG = wrapped(
    "IMTLG",
    aggregation.IMTLG,
    "Liu et al., Towards Impartial Multi-task Learning, ICLR 2021",
    """IMTL-G: the direction with equal projections on all exits' gradients.

    Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, https://discovery.ucl.ac.uk/id/eprint/10120667/

    d [D] = G^T a, with a [K] such that <d, g_k / |g_k|> is the same for all k, and sum_k a_k = 1.

    Example:
        >>> exitkit.build_strategy("imtlg").scale(readers=4, exits=4)
        1.0
    """,
    is_mean=True,
)
AlignedMTL = wrapped(
    "AlignedMTL",
    aggregation.AlignedMTL,
    "Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023",
    """Aligned-MTL: the mean of the exits' gradients after making them orthogonal and equally long.

    Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023,
    https://openaccess.thecvf.com/content/CVPR2023/html/Senushkin_Independent_Component_Alignment_for_Multi-Task_Learning_CVPR_2023_paper.html

    d [D] = 1/K sum_k h_k, with H [K, D] = s U V^T for the singular values s_1 >= ... >= s of G = U S V^T.

    Example:
        >>> exitkit.build_strategy("aligned", size="sum").scale(readers=4, exits=4)
        4.0
    """,
    is_mean=True,
)
GradDrop = wrapped(
    "GradDrop",
    aggregation.GradDrop,
    "Chen et al., Just Pick a Sign: Gradient Sign Dropout, NeurIPS 2020",
    """GradDrop: for each component, keep the exits' gradients of one randomly drawn sign.

    Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout, NeurIPS 2020,
    https://arxiv.org/abs/2010.06808

    d [D]: d_i is the sum of the g_ki of one sign, the positive one with probability
    1/2 (1 + sum_k g_ki / sum_k |g_ki|).

    Example:
        >>> exitkit.build_strategy("graddrop", size="sum").scale(readers=4, exits=4)
        1.0
    """,
    is_mean=False,
)
UPGrad = wrapped(
    "UPGrad",
    aggregation.UPGrad,
    "Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024",
    """UPGrad: the mean of the exits' gradients, each projected so that it conflicts with none of them.

    Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, https://arxiv.org/abs/2406.16232

    d [D] = 1/K sum_k P(g_k), P the projection onto { x [D] : G x >= 0 }.

    Example:
        >>> exitkit.build_strategy("upgrad", size="sum").scale(readers=4, exits=4)
        4.0
    """,
    is_mean=True,
)
DualProj = wrapped(
    "DualProj",
    aggregation.DualProj,
    "Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017",
    """DualProj: the mean gradient, projected so that it conflicts with no exit's gradient.

    Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017,
    https://arxiv.org/abs/1706.08840

    d [D] = P(1/K sum_k g_k), P the projection onto { x [D] : G x >= 0 }.

    Example:
        >>> exitkit.build_strategy("dualproj", size="sum").scale(readers=4, exits=4)
        4.0
    """,
    is_mean=True,
)
ConFIG = wrapped(
    "ConFIG",
    aggregation.ConFIG,
    "Liu et al., ConFIG: Conflict-free Training of Physics Informed Neural Networks, 2024",
    """ConFIG: the direction at equal angles to all exits' gradients.

    Liu et al., ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, 2024,
    https://arxiv.org/abs/2408.11104

    d [D] = (sum_k <g_k, u>) u, with u [D] of length 1 and <u, g_k / |g_k|> the same for all k.

    Example:
        >>> exitkit.build_strategy("config", size="sum").scale(readers=4, exits=4)
        1.0
    """,
    is_mean=False,
)


@dataclass(eq=False)
class NashMTL(Aggregated):
    """Nash-MTL: the direction of the exits' Nash bargaining solution; each step starts from the last solution.

    Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, https://arxiv.org/abs/2202.01017

    d [D] = G^T a, with a [K] > 0 the solution of G G^T a = 1 / a; a longer d than `max_norm` is shortened to it.

    Example:
        >>> exitkit.build_strategy("nashmtl", max_norm=2.0).max_norm
        2.0
    """

    paper: ClassVar[str] = "Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022"
    is_mean: ClassVar[bool] = False

    max_norm: float = setting(1.0, "largest length of the direction; 0: no limit")

    _bargain: aggregation.NashMTL | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.max_norm >= 0 and math.isfinite(self.max_norm)):
            raise UserError(f"max_norm is {self.max_norm}; expected at least 0")
        try:
            aggregation.NashMTL(2)
        except ImportError:
            raise UserError("nashmtl needs a solver that is not installed; pip install 'exitkit[nashmtl]'") from None

    def prepare(self, run: Run) -> None:
        """Discard the last solution."""
        self._bargain = None

    def aggregator(self, exits: int) -> aggregation.Aggregator:
        """Return torchjd's Nash-MTL, which keeps its last solution."""
        if self._bargain is None:
            self._bargain = aggregation.NashMTL(exits, self.max_norm)
        return self._bargain

    def combine(self, run: Run, matrix: Tensor) -> Tensor:
        """Return the direction of the bargaining solution: g / |g| for one gradient g, which the solver refuses."""
        if len(matrix) == 1:
            length = min(self.max_norm, 1.0) if self.max_norm else 1.0
            direction: Tensor = length * matrix[0] / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
            return direction
        if not matrix.any():  # there is nothing to bargain about
            return matrix.sum(0)
        with warnings.catch_warnings():  # the solver warns about its speed
            warnings.simplefilter("ignore", UserWarning)
            return super().combine(run, matrix)

    def state_dict(self) -> dict[str, Any]:
        """Return the last solution."""
        return {} if self._bargain is None else {"bargain": torch.as_tensor(self._bargain.weighting.prvs_alpha)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the last solution."""
        self._bargain = None
        if state:
            bargain = self.aggregator(len(state["bargain"]))
            assert isinstance(bargain, aggregation.NashMTL)
            bargain.weighting.prvs_alpha = state["bargain"].cpu().numpy()
