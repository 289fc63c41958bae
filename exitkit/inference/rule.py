"""An exit rule: when a sample leaves. What a deployment needs to know besides the network, and no more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import inf, isfinite, isnan, log
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from exitkit.errors import UserError, unknown
from exitkit.exit_rules import SCORES, Agreement, checked_temperatures, exit_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exitkit.evaluation import Share
    from exitkit.runs import RunFolder

_CLOSE = 1e-9
"""A score as near as this to its threshold is computed as the evaluation computes it: torch's last digits differ."""


@dataclass(frozen=True)
class ExitRule:
    """A sample leaves at the first exit whose score reaches that exit's threshold.

    Args:
        score: one of `exit_rules.SCORES`; the larger, the surer.
        thresholds: [K], one an exit; infinity closes an exit, and the last is -infinity: it takes whoever is left.
        temperatures: [K], divide each exit's logits first; None: 1 everywhere.

    Raises:
        UserError: no such score, thresholds that end otherwise or hold a NaN; temperatures that are not positive, or
            such for patience, which they can't change.
    """

    score: str
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise unknown("exit rule", self.score, SCORES)
        limits = tuple(float(value) for value in self.thresholds)
        if any(map(isnan, limits)):
            raise UserError(f"thresholds are {list(limits)}; expected a number an exit")
        if not limits or limits[-1] != -inf:
            raise UserError(f"thresholds are {list(limits)}; expected -infinity for the last exit, which takes all")
        object.__setattr__(self, "thresholds", limits)
        if self.temperatures is None:
            return
        if self.score == "patience":
            raise UserError("patience counts predictions, which no temperature changes; leave temperatures out")
        heat = checked_temperatures(self.temperatures, len(limits))
        object.__setattr__(self, "temperatures", tuple(heat.tolist()))

    def leaving(self, index: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        """Return who leaves at exit `index` (from 0), and what the rule has to remember of each sample.

        On the CPU the decisions are those of `exit_rules.exit_scores`, to the last bit; elsewhere the same scores in
        float64, whose last digit may differ.

        Args:
            index: the exit.
            logits: of the samples that are still there, [N, C].
            memory: what the exit before returned, with the rows of samples that left dropped; None at the first.

        Returns:
            whether each sample leaves [N], on the CPU, and the memory: a pytree of tensors [N] or None.

        Raises:
            UserError: logits that are not finite.
        """
        temperature = 1.0 if self.temperatures is None else self.temperatures[index]
        # Half precision is widened before numpy sees it, which does not know all of torch's formats.
        outputs = logits.detach() if logits.requires_grad else logits
        outputs = outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()
        if index == len(self.thresholds) - 1:  # it takes all, however sure it is
            if not outputs.amax(1).isfinite().all():
                raise self._not_finite(index)
            return torch.ones(len(outputs), dtype=torch.bool), None
        if outputs.is_cpu and self.score != "patience":
            # A few calls of torch cost a single image less than numpy's cold ones, and tell most samples apart.
            sure, limit = _score_there(outputs, self.score, temperature), self.thresholds[index]
            margin = _CLOSE * max(1.0, abs(limit)) if isfinite(limit) else 0.0
            leaves = sure >= limit + margin
            if (leaves ^ (sure < limit - margin)).all():  # a NaN is neither
                return leaves, None
        if outputs.is_cpu:
            before = None if memory is None else Agreement(*(part.numpy() for part in memory))
            found, after = exit_scores(outputs.numpy(), self.score, temperature, before, exit=index + 1)
            sure = torch.from_numpy(found)
            memory = None if after is None else tuple(map(torch.from_numpy, after))
        elif self.score == "patience":
            predicted = outputs.argmax(1)
            sure = torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)
            if memory is not None:
                sure += torch.where(predicted == memory[0], memory[1], 0)
            memory = (predicted, sure)
        else:
            sure = _score_there(outputs, self.score, temperature)
        leaves = sure >= self.thresholds[index]
        if not leaves.is_cpu:
            # The one wait for the device: it tells who leaves, and whether there is anything that is not finite.
            told = torch.where(outputs.amax(1).isfinite(), leaves, 2).cpu()
            if (told == 2).any():
                raise self._not_finite(index)
            leaves = told == 1
        return leaves, memory

    @staticmethod
    def _not_finite(index: int) -> UserError:
        return UserError(f"the logits of exit {index + 1} are not finite; an exit rule needs finite outputs")

    @classmethod
    def from_run(
        cls,
        run: RunFolder | str,
        *,
        budget: float | str | None = None,
        share: Share | None = None,
        score: str = "confidence",
        calibrated: bool = False,
    ) -> ExitRule:
        """Find the thresholds of a finished run, on its stored validation outputs alone.

        Args:
            run: the run, or its folder.
            budget: average cost of an image: multiply-adds (`40e6`, `"40M"`), or milliseconds that `exitkit bench` has
                measured (`"1.5ms"`); the shares of the exits come from BoostNet's equation 9.
            share: instead, the ratio q between the shares of neighbouring exits. With neither: the cheapest of the
                papers' operating points that loses nothing against the last exit.
            score: one of `exit_rules.SCORES`.
            calibrated: divide each exit's logits by a temperature fitted on the validation samples first.

        Raises:
            UserError: no such run, an unfinished one, a budget below the first exit's cost, or both kinds of wish.
        """
        from exitkit.inference.choice import choose

        return choose(run, budget=budget, share=share, score=score, calibrated=calibrated)

    @classmethod
    def from_outputs(
        cls,
        logits: Tensor,
        labels: Tensor,
        costs: Sequence[float],
        *,
        budget: float | str | None = None,
        share: Share | None = None,
        score: str = "confidence",
        calibrated: bool = False,
    ) -> ExitRule:
        """Find the thresholds of a network that was trained in a loop of one's own.

        Args:
            logits: what every exit said of each validation image, [N, K, C]; of images that did not train it.
            labels: their classes, [N].
            costs: of an image up to each exit, [K]: multiply-adds, or milliseconds, as the budget.
            budget, share, score, calibrated: see `from_run`.

        Raises:
            UserError: shapes that do not fit, or what `from_run` refuses.
        """
        from exitkit.inference.choice import choose_for

        try:
            known = np.asarray(costs, dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError(f"costs are {costs}; expected a number an exit") from None
        if logits.dim() != 3 or not logits.numel() or labels.shape != logits.shape[:1]:
            raise UserError(
                f"logits are of shape {list(logits.shape)}, and labels of {list(labels.shape)}; "
                "expected [N, K, C] and [N], none of them 0"
            )
        if known.shape != logits.shape[1:2]:
            raise UserError(f"costs are {known.tolist()}; expected {logits.shape[1]}, one an exit")
        if not (np.isfinite(known).all() and known[0] > 0 and (np.diff(known) >= 0).all()):
            raise UserError(f"costs are {known.tolist()}; expected positive ones that do not fall from exit to exit")
        arrays = logits.detach().cpu().float().numpy(), labels.cpu().numpy()
        return choose_for(*arrays, known, budget, share, score, calibrated)

    def to_json(self) -> str:
        """Return the rule as JSON; infinities are words, since JSON has no such numbers."""
        words = {inf: "inf", -inf: "-inf"}
        limits = [words.get(value, value) for value in self.thresholds]
        return json.dumps({"score": self.score, "thresholds": limits, "temperatures": self.temperatures})

    @classmethod
    def from_json(cls, text: str) -> ExitRule:
        """Read what `to_json` gave; other keys are left alone (an exported `policy.json` has more).

        Raises:
            UserError: it is no such text.
        """
        try:
            values = json.loads(text)
            heat = values["temperatures"]
            return cls(values["score"], _numbers(values["thresholds"]), None if heat is None else _numbers(heat))
        except UserError:
            raise
        except (TypeError, ValueError, LookupError) as error:
            raise UserError(f"{text[:60]!r} is no exit rule ({error}); expected what ExitRule.to_json gives") from None


def _numbers(values: list[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _score_there(logits: Tensor, score: str, temperature: float = 1.0) -> Tensor:
    """Return what `exit_rules.exit_scores` gives, [N] in float64, on the device where the logits [N, C] are."""
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
