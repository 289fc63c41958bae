"""The common parts of all exit rules: validation outputs, rules at all operating points, and their text as JSON.

A rule decides, exit by exit, which samples leave. It is fitted on validation outputs for P operating points at once
(`FittedRule`); `FittedRule.at` returns the rule of one point, which a deployment applies (`PointRule`). There are two
kinds: a `ThresholdRule` compares one of `scores.SCORES` with thresholds and is deployed as an `ExitRule`; a
`SequentialRule` computes what it compares from its own arrays and from a memory of the earlier exits. The decisions of
a deployed rule equal those of `leave_at` sample by sample, because both call the same functions, in which no row
depends on another row and no operating point on another.

Shapes: N or M samples, K exits, C classes, P operating points, in ascending order of planned cost. Exits from 0.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from exitkit.errors import UserError
from exitkit.inference.as_json import decoded, encoded
from exitkit.inference.outputs import Embeddings, ExitOutputs, ExitView
from exitkit.inference.rule import ExitRule, PointRule
from exitkit.inference.thresholds import Floats, Integers, leave_at

Booleans = NDArray[np.bool_]


class Validation(NamedTuple):
    """Validation outputs, on which rules are fitted."""

    outputs: ExitOutputs
    """Of N samples and K exits."""
    labels: Integers
    """[N], 0..C-1."""
    costs: Floats
    """[K]: cumulative cost of leaving at each exit; positive, not decreasing."""

    @classmethod
    def checked(
        cls, logits: ArrayLike, labels: ArrayLike, costs: ArrayLike, embeddings: Embeddings | None = None
    ) -> Validation:
        """Return validation outputs of consistent shapes.

        Raises:
            UserError: a shape is wrong, there are no samples, a label is not a class, or the costs are not positive
                numbers that do not decrease.
        """
        outputs, classes = np.asarray(logits), np.asarray(labels)
        try:
            cost = np.asarray(costs, dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError(f"costs are {costs!r}; expected one number per exit") from None
        if outputs.ndim != 3 or not outputs.size or classes.shape != outputs.shape[:1]:
            raise UserError(
                f"logits have the shape {list(outputs.shape)}, and labels {list(classes.shape)}; "
                "expected [N, K, C] and [N], none of them 0"
            )
        if outputs.dtype.kind not in "fiu" or classes.dtype.kind not in "iu":
            raise UserError(f"logits are {outputs.dtype}, and labels {classes.dtype}; expected numbers, and integers")
        if classes.min() < 0 or classes.max() >= outputs.shape[2]:
            raise UserError(f"labels {classes.min()}..{classes.max()}; expected classes 0..{outputs.shape[2] - 1}")
        if cost.shape != outputs.shape[1:2]:
            raise UserError(f"costs are {cost.tolist()}; expected {outputs.shape[1]}, one per exit")
        if not (np.isfinite(cost).all() and cost[0] > 0 and (np.diff(cost) >= 0).all()):
            raise UserError(f"costs are {cost.tolist()}; expected positive numbers that do not decrease")
        return cls(ExitOutputs(outputs, embeddings), classes.astype(np.int64), cost)

    @property
    def logits(self) -> np.ndarray:
        """[N, K, C]; -infinity excludes a class."""
        return self.outputs.logits

    def rows(self, rows: Integers) -> Validation:
        """Return some of the samples."""
        return self._replace(outputs=self.outputs.rows(rows), labels=self.labels[rows])

    def correct(self) -> Booleans:
        """Return whether each exit is right, [N, K]."""
        return self.outputs.correct(self.labels)


class FittedRule(ABC):
    """A rule that has been fitted on validation outputs, at P operating points."""

    name: ClassVar[str]
    """One of `rules.RULES`."""

    @property
    @abstractmethod
    def points(self) -> int:
        """The number of operating points, P."""

    @property
    @abstractmethod
    def exits(self) -> int:
        """The number of exits, K."""

    @abstractmethod
    def leave_at(self, logits: ArrayLike | ExitOutputs) -> Integers:
        """Return the exit (0-based) where each sample leaves, [P, M], from logits [M, K, C], or outputs.

        Raises:
            UserError: the logits are of another number of exits or are not finite (-infinity excludes a class).
        """

    @abstractmethod
    def at(self, point: int) -> PointRule:
        """Return the rule of one operating point, 0..P-1.

        Raises:
            UserError: there is no such point.
        """

    def _checked_point(self, point: int) -> int:
        if not 0 <= point < self.points:
            raise UserError(f"operating point {point}; expected 0..{self.points - 1}")
        return point


@dataclass(frozen=True, eq=False)
class ThresholdRule(FittedRule):
    """A sample leaves at the first exit whose score reaches that exit's threshold.

    Args:
        score: one of `scores.SCORES`.
        limits: thresholds [P, K]; the last of each point is -infinity.
    """

    score: str
    limits: Floats

    @property
    def points(self) -> int:
        """The number of operating points, P."""
        return len(self.limits)

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return int(self.limits.shape[1])

    def leave_at(self, logits: ArrayLike | ExitOutputs) -> Integers:
        """Return the exit (0-based) where each sample leaves, [P, M]; see `FittedRule.leave_at`."""
        return leave_at(ExitOutputs.of(logits, self.exits).scores(self.score), self.limits)

    def at(self, point: int) -> ExitRule:
        """Return the rule of one operating point; see `FittedRule.at`."""
        return ExitRule(self.score, tuple(self.limits[self._checked_point(point)].tolist()))


@dataclass(frozen=True, eq=False)
class SequentialRule(FittedRule):
    """A rule with arrays of its own and a memory of the earlier exits.

    The fields of a subclass are arrays, tuples of arrays, and strings; they are written to the JSON text. `decide` must
    treat every sample and every operating point on its own, so that a sample may be decided alone or in any batch.
    """

    per_point: ClassVar[tuple[str, ...]]
    """The fields whose first axis is the operating points."""

    def __post_init__(self) -> None:
        lengths = {np.shape(getattr(self, field))[:1] for field in self.per_point}
        if len(lengths) != 1 or () in lengths:
            raise UserError(f"{', '.join(self.per_point)} of the rule {self.name} are not of the same operating points")

    @abstractmethod
    def decide(self, view: ExitView, memory: Any) -> tuple[Booleans, Any]:
        """Return which samples leave at an exit other than the last, at each operating point, [N, P], and the memory.

        Args:
            view: the outputs of the exit.
            memory: the memory returned for the exit before, a pytree of arrays [N, ...]; None at the first exit.
        """

    @property
    def points(self) -> int:
        """The number of operating points, P."""
        return len(getattr(self, self.per_point[0]))

    def leave_at(self, logits: ArrayLike | ExitOutputs) -> Integers:
        """Return the exit (0-based) where each sample leaves, [P, M]; see `FittedRule.leave_at`."""
        outputs = ExitOutputs.of(logits, self.exits)
        exit_index = np.zeros((self.points, len(outputs)), dtype=np.int64)
        stays = np.ones(exit_index.shape, dtype=bool)
        memory = None
        for view in outputs.exits[:-1]:
            leaves, memory = self.decide(view, memory)
            stays &= ~leaves.T
            exit_index += stays
        _refuse_non_finite(outputs.exits[-1])
        return exit_index

    def at(self, point: int) -> Self:
        """Return the rule of one operating point, of the same class; see `FittedRule.at`."""
        self._checked_point(point)
        return replace(self, **{field: getattr(self, field)[point : point + 1] for field in self.per_point})

    def leaving(self, index: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """Return which samples leave at exit `index`, and the rule's memory of each sample; see `ExitRule.leaving`.

        The decisions are made on the CPU, in float64; the memory is on the device of the logits.

        Args:
            index: the exit, from 0.
            logits: logits of the samples that have not left, [N, C].
            memory: the memory returned for the exit before, without the rows of samples that left; None at the first.

        Returns:
            whether each sample leaves, bool [N] on the CPU, and the memory: a pytree of tensors [N, ...], or None.

        Raises:
            UserError: a logit is not finite, or the rule is of several operating points.
        """
        if self.points != 1:
            raise UserError(f"the rule has {self.points} operating points; choose one with at(point)")
        outputs = logits.detach()
        values = (outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()).cpu().numpy()
        if index == self.exits - 1:
            _refuse_non_finite(ExitView(values, index))
            return torch.ones(len(values), dtype=torch.bool), None
        before = pytree.tree_map_only(Tensor, lambda tensor: tensor.cpu().numpy(), memory)
        leaves, after = self.decide(ExitView(values, index), before)
        after = pytree.tree_map_only(np.ndarray, lambda array: torch.from_numpy(array).to(logits.device), after)
        return torch.from_numpy(leaves[:, 0].copy()), after

    def to_json(self) -> str:
        """Return the rule as JSON; infinities are written as strings, since JSON has no such numbers."""
        parts = {field.name: encoded(getattr(self, field.name)) for field in fields(self)}
        return json.dumps({"rule": {"name": self.name, **parts}})

    @classmethod
    def from_parts(cls, parts: dict[str, Any]) -> Self:
        """Return the rule of the table `rule` of the decoded JSON text; other keys are ignored.

        Raises:
            KeyError, TypeError, ValueError: the parts are not those of this rule.
        """
        return cls(**{field.name: decoded(parts[field.name]) for field in fields(cls)})


def _refuse_non_finite(last: ExitView) -> None:
    """Raise the error for outputs of the last exit that are NaN or +infinity, as at the other exits."""
    if len(last.logits):
        last.score("confidence")
