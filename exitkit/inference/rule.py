"""An exit rule: when a sample leaves. Together with the network it is all that a deployment needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, isnan, log
from typing import Any, ClassVar

import torch
from torch import Tensor

from exitkit.errors import UserError, unknown
from exitkit.inference.scores import SCORES, Agreement, checked_temperatures, exit_scores

_CLOSE = 1e-9
"""A score this close to its threshold is computed as the evaluation computes it: torch's last digits differ."""


@dataclass(frozen=True)
class ExitRule:
    """A sample leaves at the first exit whose score reaches that exit's threshold.

    Args:
        score: one of `scores.SCORES`.
        thresholds: [K], one per exit; infinity closes an exit, and the last is -infinity: all remaining samples leave.
        temperatures: [K], divide each exit's logits first; None: 1 everywhere.

    Raises:
        UserError: no such score, thresholds that end otherwise or hold a NaN; temperatures that are not positive, or
            such for patience, which they can't change.
    """

    from_run: ClassVar[Callable[..., ExitRule]]
    """Find the thresholds of a finished run; see `exitkit.inference.choose.rule_of_run`."""
    from_outputs: ClassVar[Callable[..., ExitRule]]
    """Find the thresholds for given outputs; see `exitkit.inference.choose.rule_of_outputs`."""

    score: str
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise unknown("exit rule", self.score, SCORES)
        limits = tuple(float(value) for value in self.thresholds)
        if any(map(isnan, limits)):
            raise UserError(f"thresholds are {list(limits)}; expected one number per exit")
        if not limits or limits[-1] != -inf:
            raise UserError(f"thresholds are {list(limits)}; expected -infinity for the last exit, which takes all")
        object.__setattr__(self, "thresholds", limits)
        if self.temperatures is None:
            return
        if self.score == "patience":
            raise UserError("patience counts predictions, which no temperature changes; leave temperatures out")
        values = checked_temperatures(self.temperatures, len(limits))
        object.__setattr__(self, "temperatures", tuple(values.tolist()))

    def leaving(self, index: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """Return which samples leave at exit `index` (from 0), and the rule's memory of each sample.

        On the CPU the decisions are those of `scores.exit_scores`, to the last bit; elsewhere the same scores in
        float64, whose last digit may differ.

        Args:
            index: the exit.
            logits: of the samples that have not left, [N, C].
            memory: what this method returned for the exit before, without the samples that left; None at the first.

        Returns:
            whether each sample leaves [N], on the CPU, and the memory: a pytree of tensors [N] or None.

        Raises:
            UserError: logits that are not finite.
        """
        temperature = 1.0 if self.temperatures is None else self.temperatures[index]
        # Half precision is widened before numpy sees it, which does not know all of torch's formats.
        outputs = logits.detach() if logits.requires_grad else logits
        outputs = outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
        if index == len(self.thresholds) - 1:  # all leave, whatever their score
            if not outputs.amax(1).isfinite().all():
                raise self._not_finite(index)
            return torch.ones(len(outputs), dtype=torch.bool), None
        if outputs.is_cpu and self.score != "patience":
            # A few calls of torch take less time for a single image than numpy's, and decide most samples.
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
            # The one wait for the device: who leaves, and whether a logit is not finite.
            states = torch.where(outputs.amax(1).isfinite(), leaves, 2).cpu()
            if (states == 2).any():
                raise self._not_finite(index)
            leaves = states == 1
        return leaves, memory

    @staticmethod
    def _not_finite(index: int) -> UserError:
        return UserError(f"the logits of exit {index + 1} are not finite; an exit rule needs finite outputs")

    def to_json(self) -> str:
        """Return the rule as JSON; infinities are words, since JSON has no such numbers."""
        words = {inf: "inf", -inf: "-inf"}
        limits = [words.get(value, value) for value in self.thresholds]
        return json.dumps({"score": self.score, "thresholds": limits, "temperatures": self.temperatures})

    @classmethod
    def from_json(cls, text: str) -> ExitRule:
        """Read what `to_json` returned; other keys are ignored (an exported `policy.json` has more).

        Raises:
            UserError: it is no such text.
        """
        try:
            values = json.loads(text)
            temperatures = values["temperatures"]
            given = None if temperatures is None else _numbers(temperatures)
            return cls(values["score"], _numbers(values["thresholds"]), given)
        except UserError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(
                f"{text[:60]!r} is no exit rule ({error}); expected the text that ExitRule.to_json returns"
            ) from None


def _numbers(values: list[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _score_on_device(logits: Tensor, score: str, temperature: float = 1.0) -> Tensor:
    """Return what `scores.exit_scores` gives, [N] in float64, on the device where the logits [N, C] are."""
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
