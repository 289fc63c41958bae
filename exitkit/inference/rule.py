"""The exit rule, which decides at which exit a sample leaves. A deployment needs it and the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, isnan, log
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from exitkit.errors import UserError, unknown
from exitkit.inference.as_json import Number, encoded, parsed, reading
from exitkit.inference.scores import SCORES, Agreement, checked_temperatures, exit_scores

_CLOSE = 1e-9
"""Scores this close to the threshold are computed by `exit_scores`, as in evaluation: torch's last digit may differ."""


_FORM = {"score": str, "thresholds": list[Number], "temperatures": list[Number] | None}
"""The fields of an exit rule in JSON, and their types."""


class PointRule(Protocol):
    """A rule at one operating point, as `AdaptiveInference` applies it: an `ExitRule`, or another of `rules`."""

    @property
    def exits(self) -> int:
        """The number of exits, K."""

    def leaving(self, index: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """Return which samples leave at exit `index`, and the memory for the next exit; see `ExitRule.leaving`."""

    def to_json(self) -> str:
        """Return the rule as JSON, for `rules.rule_from_json`."""


@dataclass(frozen=True)
class ExitRule:
    """A sample leaves at the first exit whose score reaches that exit's threshold.

    Args:
        score: one of `scores.SCORES`.
        thresholds: [K], one per exit; no sample leaves at an exit of threshold infinity, and the last threshold is
            -infinity, so that all remaining samples leave.
        temperatures: [K], by which the logits of each exit are divided; None: 1 for all exits.

    Raises:
        UserError: the score is unknown, a threshold is NaN, the last one is not -infinity, a temperature is not
            positive, or temperatures are given for patience, which does not depend on them.
    """

    from_run: ClassVar[Callable[..., ExitRule]]
    """Choose the rule of a finished run; see `exitkit.inference.choose.rule_of_run`."""
    from_outputs: ClassVar[Callable[..., ExitRule]]
    """Choose the rule for given outputs; see `exitkit.inference.choose.rule_of_outputs`."""

    score: str
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise unknown("exit rule", self.score, SCORES)
        try:
            limits = tuple(float(value) for value in self.thresholds)
        except (TypeError, ValueError):
            raise UserError(f"thresholds are {self.thresholds!r:.80}; expected one number per exit") from None
        if any(map(isnan, limits)):
            raise UserError(f"thresholds are {list(limits)}; expected one number per exit")
        if not limits or limits[-1] != -inf:
            raise UserError(f"thresholds are {list(limits)}; expected -infinity for the last exit")
        object.__setattr__(self, "thresholds", limits)
        if self.temperatures is None:
            return
        if self.score == "patience":
            raise UserError("temperatures do not change the score patience; leave them out")
        values = checked_temperatures(self.temperatures, len(limits))
        object.__setattr__(self, "temperatures", tuple(values.tolist()))

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return len(self.thresholds)

    def leaving(self, index: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """Return which samples leave at exit `index` (from 0), and the rule's memory of each sample.

        On the CPU the decisions are those of `scores.exit_scores`, bit for bit; on other devices the scores are
        computed in float64, and their last digit may differ.

        Args:
            index: the exit.
            logits: logits of the samples that have not left, [N, C].
            memory: the memory returned for the exit before, without the rows of samples that left; None at the first.

        Returns:
            whether each sample leaves, bool [N] on the CPU, and the memory: a pytree of tensors [N], or None.

        Raises:
            UserError: a logit is not finite.
        """
        temperature = 1.0 if self.temperatures is None else self.temperatures[index]
        # Half precision is converted to float32, since numpy does not support all of torch's dtypes.
        outputs = logits.detach() if logits.requires_grad else logits
        outputs = outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
        if index == len(self.thresholds) - 1:  # all remaining samples leave
            if not outputs.amax(1).isfinite().all():
                raise self._not_finite(index)
            return torch.ones(len(outputs), dtype=torch.bool), None
        if outputs.is_cpu and self.score != "patience":
            # torch is faster than numpy for one image, and decides all samples that are not close to the threshold.
            values, limit = _score_on_device(outputs, self.score, temperature), self.thresholds[index]
            margin = _CLOSE * max(1.0, abs(limit)) if isfinite(limit) else 0.0
            leaves = values >= limit + margin
            if (leaves ^ (values < limit - margin)).all():  # a NaN is neither
                return leaves, None
        if outputs.is_cpu:
            before = None if memory is None else Agreement(*(part.numpy() for part in memory))
            exact, after = exit_scores(outputs.numpy(), self.score, temperature, before, exit=index + 1)
            values = torch.from_numpy(exact)
            memory = None if after is None else tuple(map(torch.from_numpy, after))
        elif self.score == "patience":
            predicted = outputs.argmax(1)
            values = torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)
            if memory is not None:
                values += torch.where(predicted == memory[0], memory[1], 0)
            memory = (predicted, values)
        else:
            values = _score_on_device(outputs, self.score, temperature)
        leaves = values >= self.thresholds[index]
        if not leaves.is_cpu:
            # One synchronisation with the device, for the decisions and for logits that are not finite.
            states = torch.where(outputs.amax(1).isfinite(), leaves, 2).cpu()
            if (states == 2).any():
                raise self._not_finite(index)
            leaves = states == 1
        return leaves, memory

    @staticmethod
    def _not_finite(index: int) -> UserError:
        return UserError(f"the logits of exit {index + 1} are not finite; an exit rule needs finite outputs")

    def to_json(self) -> str:
        """Return the rule as JSON; infinities are written as strings, since JSON has no such numbers."""
        parts = {"score": self.score, "thresholds": self.thresholds, "temperatures": self.temperatures}
        return json.dumps({name: encoded(value) for name, value in parts.items()})

    @classmethod
    def from_json(cls, text: str) -> ExitRule:
        """Return the rule of a text that `to_json` returned; other keys are ignored (`policy.json` has more).

        Raises:
            UserError: the text is not a rule.
        """
        with reading(text, "an exit rule"):
            values = parsed(text, _FORM)
            temperatures = values["temperatures"]
            divisors = None if temperatures is None else _numbers(temperatures)
            return cls(values["score"], _numbers(values["thresholds"]), divisors)


def _numbers(values: list[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _score_on_device(logits: Tensor, score: str, temperature: float = 1.0) -> Tensor:
    """Return the scores of `scores.exit_scores`, [N] in float64, on the device of the logits [N, C]."""
    z = logits.double()
    if score == "confidence" and temperature == 1:
        return z.softmax(1).amax(1)
    z = (z - z.amax(1, keepdim=True)) / temperature
    classes = z.shape[1]
    if classes == 1 and score != "confidence":
        return torch.ones_like(z[:, 0])
    weights = z.exp()
    total = weights.sum(1)
    if score == "confidence":
        return 1 / total
    if score == "margin":
        return -torch.expm1(z.topk(2).values[:, 1]) / total
    spread = total.log() - (weights * torch.where(weights > 0, z, 0)).sum(1) / total
    return (1 - spread / log(classes)).clamp(min=0)
