"""Exit policies: a combination of exits, a score and a rule, chosen by name, fitted, and applied at an operating point.

A policy is written as the words that differ from plain confidence with the papers' shares, joined by plus signs:
`mie`, `margin`, `mie+stopping`, `agreement:weights=linear`. Each word is a combination of `combinations.COMBINATIONS`
or `laplace.LAPLACE` (or `plain`), a score of `scores.SCORES`, or a rule of `rules.RULES` with fields. The combinations
of `LAPLACE` also read the embeddings of the exits, which `exitkit evaluate --embeddings` stores.

`PolicyName` is that choice, `FittedPolicy` the policy fitted on validation outputs at all its operating points, and
`ExitPolicy` the policy at one of them, which `AdaptiveInference` applies. `cross_fit` also decides every validation
sample by a policy that was fitted on other samples: the accuracy of the fit's own samples is optimistic.

Shapes: N samples, K exits, C classes, P operating points. Exits from 0.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from exitkit.errors import UserError, unknown
from exitkit.escaping import counted
from exitkit.inference.as_json import reading
from exitkit.inference.combinations import COMBINATIONS, FITTED, Combination, fit_combination
from exitkit.inference.laplace import LAPLACE, Laplace, fit_laplace
from exitkit.inference.outputs import Embeddings, ExitOutputs
from exitkit.inference.rule import PointRule
from exitkit.inference.rules import RULES, SCORED, FittedRule, fit_validated, reads, rule_fields, rule_from_json
from exitkit.inference.rules.base import Booleans, Validation
from exitkit.inference.scores import SCORES
from exitkit.inference.thresholds import Integers
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.plugins import check_value

PLAIN = "plain"
"""Name of the outputs without a combination."""
KNOWN = (PLAIN, *COMBINATIONS, *LAPLACE)
"""Names of all combinations."""
FOLDS = 5


@dataclass(frozen=True)
class PolicyName:
    """A policy by its names; the default is plain confidence with the papers' shares.

    Args:
        combination: one of `KNOWN`.
        score: one of `scores.SCORES`; "" for rules that compute their own.
        rule: one of `rules.RULES`.
        fields: (field, value) pairs of the rule; see `rules.rule_fields`.

    Raises:
        UserError: a name or a field is unknown, or the rule does not read the score.
    """

    combination: str = PLAIN
    score: str = "confidence"
    rule: str = "shares"
    fields: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("combination", self.combination, KNOWN),
            ("score", self.score or SCORES[0], SCORES),
            ("rule", self.rule, RULES),
        ):
            if name not in known:
                raise unknown(kind, name, known)
        if self.rule not in SCORED and self.score in ("", SCORES[0]):
            object.__setattr__(self, "score", "")
        elif not reads(self.rule, self.score):
            able = ", ".join(rule for rule in RULES if reads(rule, self.score))
            raise UserError(f"{self.rule} can't use the score {self.score}; rules that can: {able}")
        hints = rule_fields(self.rule)
        for name, _ in self.fields:
            if name not in hints:
                raise unknown(f"field of the rule {self.rule}", name, hints)
        typed = {name: check_value(f"{self.rule}: {name}", hints[name], value) for name, value in self.fields}
        object.__setattr__(self, "fields", tuple(typed.items()))

    @property
    def reads_embeddings(self) -> bool:
        """Whether the policy needs the embeddings of the exits besides their outputs."""
        return self.combination in LAPLACE

    @property
    def rule_text(self) -> str:
        """The rule with its fields: `agreement:weights=linear`."""
        fields = ",".join(f"{name}={str(value).lower()}" for name, value in self.fields)
        return f"{self.rule}:{fields}" if fields else self.rule

    def __str__(self) -> str:
        return label(self.combination, self.score, self.rule_text)


def label(combination: str, score: str, rule: str) -> str:
    """Return the text of a policy, for `read_policy`: its parts that differ from plain confidence with shares."""
    parts = zip((combination, score, rule), (PLAIN, "confidence", "shares"), strict=True)
    return "+".join(name for name, usual in parts if name not in ("", usual)) or "confidence"


BASELINE = PolicyName()
"""Plain confidence with the papers' shares, with which other policies are compared."""


def read_policy(text: str) -> PolicyName:
    """Return the policy of a text such as `mie+stopping` or `agreement:weights=linear`.

    Raises:
        UserError: a word is unknown, two words are of the same kind, a field is unknown, invalid or given twice, or the
            rule does not read the score.
    """
    kinds = {"combination": KNOWN, "score": SCORES, "rule": RULES}
    found: dict[str, str] = {}
    fields: list[tuple[str, Any]] = []
    for word in text.split("+"):
        name, colon, values = (part.strip() for part in word.partition(":"))
        kind = next((kind for kind, names in kinds.items() if name in names), None)
        if kind is None:
            raise unknown("combination, score or rule", name, [name for names in kinds.values() for name in names])
        if kind in found:
            raise UserError(f"policy {text!r} has two {kind}s, {found[kind]} and {name}; expected at most one")
        found[kind] = name
        if colon and kind != "rule":
            raise UserError(f"policy {text!r}: {name} has no fields; expected {name} alone")
        for pair in values.split(",") if colon else ():
            field, equals, value = (part.strip() for part in pair.partition("="))
            if not equals:
                raise UserError(f"policy {text!r}: {pair!r} is not a field and its value; expected {name}:FIELD=VALUE")
            if field in dict(fields):
                raise UserError(f"policy {text!r} has {field} twice; expected it once")
            fields.append((field, value))
    return PolicyName(**found, fields=tuple(fields))


@dataclass(frozen=True)
class ExitPolicy:
    """A policy at one operating point, as `AdaptiveInference` and exported networks apply it.

    Args:
        rule: an `ExitRule`, or another rule of `rules` at one operating point.
        combination: the combination whose outputs the rule reads; None: the exits' own logits.

    Raises:
        UserError: rule and combination are for different numbers of exits.
    """

    from_run: ClassVar[Callable[..., ExitPolicy]]
    """Choose the policy of a finished run; see `exitkit.inference.choose.policy_of_run`."""
    from_outputs: ClassVar[Callable[..., ExitPolicy]]
    """Choose the policy for given outputs; see `exitkit.inference.choose.policy_of_outputs`."""

    rule: PointRule
    combination: Combination | Laplace | None = None

    def __post_init__(self) -> None:
        if self.combination is not None and self.combination.exits != self.rule.exits:
            raise UserError(
                f"the combination is for {counted(self.combination.exits, 'exit')} and the rule for {self.rule.exits}; "
                "expected the same number"
            )

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return self.rule.exits

    @property
    def reads_embeddings(self) -> bool:
        """Whether the policy needs the embeddings of the exits besides their outputs."""
        return isinstance(self.combination, Laplace)

    def decide(self, index: int, logits: Tensor, memory: Any = None) -> tuple[Tensor, Tensor, Any]:
        """Return the outputs of exit `index`, which samples leave there, and the policy's memory of each sample.

        Args:
            index: the exit, from 0.
            logits: the network's outputs at the exit, of the samples that have not left, [N, C].
            memory: the memory returned for the exit before, without the rows of samples that left; None at the first.

        Returns:
            the outputs: the logits, or the combination's log-probabilities [N, C] in float64; whether each sample
            leaves, bool [N] on the CPU; and the memory: a pytree of tensors [N, ...], or None.

        Raises:
            UserError: a logit is not finite, or the combination reads embeddings (see `placed_in`).
        """
        if self.combination is None:
            return logits, *self.rule.leaving(index, logits, memory)
        if isinstance(self.combination, Laplace):
            raise UserError(f"{self.combination.name} reads embeddings; expected the policy that placed_in returns")
        carry, before = memory or (None, None)
        outputs, carry = self.combination.step(index, logits, carry)
        leaves, after = self.rule.leaving(index, outputs, before)
        return outputs, leaves, (carry, after)

    def placed_in(self, network: MultiExitNetwork) -> tuple[MultiExitNetwork, ExitPolicy]:
        """Return a network and a policy that decides on its outputs as this policy does on those of `network`.

        They are `network` and this policy, unless the combination reads embeddings, which a policy can't: then the
        outputs of the returned network, a copy, are those of the combination.

        Raises:
            UserError: the rule is for another number of exits, or the combination does not fit the network.
        """
        if self.exits != network.num_exits:
            raise UserError(
                f"the rule is for {counted(self.exits, 'exit')}; expected {network.num_exits}, those of the network"
            )
        if not isinstance(self.combination, Laplace):
            return network, self
        return self.combination.linked(network), ExitPolicy(self.rule)

    def on_outputs(self, logits: Tensor, embeddings: Embeddings | None = None) -> tuple[Tensor, Tensor]:
        """Decide on the outputs of all exits, [N, K, C], afterwards; see `decide`.

        Args:
            logits: the network's outputs.
            embeddings: of the same samples, which some combinations read.

        Returns:
            the outputs [N, C] at the exit where each sample leaves, and that exit [N] (0-based), on the CPU.
        """
        if isinstance(self.combination, Laplace):
            combined = self.combination(ExitOutputs(logits.detach().cpu().numpy(), embeddings))
            return ExitPolicy(self.rule).on_outputs(torch.from_numpy(combined))
        exits = torch.full((len(logits),), -1)
        at_exits, memory = [], None
        for index in range(self.exits):
            outputs, leaves, memory = self.decide(index, logits[:, index], memory)
            at_exits.append(outputs)
            exits[leaves & (exits < 0)] = index
        return torch.stack(at_exits, 1)[torch.arange(len(exits)), exits], exits

    def to_json(self) -> str:
        """Return the policy as JSON: the keys of its rule, and its combination, if any, under `combination`."""
        parts = json.loads(self.rule.to_json())
        if self.combination is not None:
            parts["combination"] = json.loads(self.combination.to_json())
        return json.dumps(parts)

    @classmethod
    def from_json(cls, text: str) -> ExitPolicy:
        """Return the policy of a text that `to_json` of a policy or of a rule returned; other keys are ignored.

        Raises:
            UserError: the text is not a policy.
        """
        rule = rule_from_json(text)
        with reading(text, "a policy"):
            combination = json.loads(text).get("combination")
            if combination is None:
                return cls(rule)
            part = json.dumps(combination)
            reads_embeddings = combination.get("name") in LAPLACE
            return cls(rule, Laplace.from_json(part) if reads_embeddings else Combination.from_json(part))


@dataclass(frozen=True)
class FittedPolicy:
    """A policy that has been fitted on validation outputs, at P operating points.

    Args:
        name: the policy.
        rule: its rule.
        combination: its combination; None: plain.
    """

    name: PolicyName
    rule: FittedRule
    combination: Combination | Laplace | None

    @property
    def points(self) -> int:
        """The number of operating points, P."""
        return self.rule.points

    def outputs(self, logits: ArrayLike | ExitOutputs) -> ExitOutputs:
        """Return what the rule reads, from logits [M, K, C] or outputs; its largest class is the prediction."""
        return _combined(self.combination, logits if isinstance(logits, ExitOutputs) else ExitOutputs(logits))

    def leave_at(self, logits: ArrayLike | ExitOutputs) -> Integers:
        """Return the exit (0-based) where each sample leaves, [P, M], from logits [M, K, C] or outputs.

        Raises:
            UserError: the logits are of another number of exits or are not finite (-infinity excludes a class).
        """
        return self.rule.leave_at(self.outputs(logits))

    def at(self, point: int) -> ExitPolicy:
        """Return the policy at one operating point, 0..P-1.

        Raises:
            UserError: there is no such point.
        """
        return ExitPolicy(self.rule.at(point), self.combination)


@dataclass(frozen=True)
class CrossFitted:
    """A policy fitted on all validation samples, and the decisions of the samples by fits on other samples.

    Each fifth of the samples is decided by the policy that is fitted on the other four.
    """

    policy: FittedPolicy
    """Fitted on all samples."""
    leaves: NDArray[np.int16]
    """[P, N]: the exit (0-based) where each sample leaves, cross-fitted."""
    hits: Booleans
    """[P, N]: whether it is right there, cross-fitted."""
    seconds: float
    """Time to fit combination and rule once, on all samples."""


def fit_policy(
    name: PolicyName | str,
    logits: ArrayLike,
    labels: ArrayLike,
    costs: ArrayLike,
    embeddings: Embeddings | None = None,
) -> FittedPolicy:
    """Return a policy, fitted on validation outputs.

    Args:
        name: the policy, or its text.
        logits: [N, K, C].
        labels: classes [N], 0..C-1.
        costs: cumulative cost of leaving at each exit, [K], in any unit.
        embeddings: of the same samples; only policies with `reads_embeddings` need them.

    Raises:
        UserError: the policy, a shape, label or cost is wrong, or a logit is not finite.
    """
    name = read_policy(name) if isinstance(name, str) else name
    validation = Validation.checked(logits, labels, costs, embeddings)
    combination = _fit_combination(name.combination, validation)
    return _fit(name, combination, _combined_validation(combination, validation))


def cross_fit(
    names: Sequence[PolicyName], validation: Validation, done: Callable[[float], None] = lambda _: None
) -> Iterator[CrossFitted]:
    """Yield policies, each fitted on all validation samples and cross-fitted; those of one combination together.

    Args:
        names: the policies.
        validation: the outputs.
        done: called with the finished share, 0..1.

    Raises:
        UserError: there are fewer samples than `FOLDS`; and see `fit_policy`.
    """
    samples = len(validation.labels)
    if samples < FOLDS:
        raise UserError(f"there are {samples} validation images; expected at least {FOLDS}, one per fold")
    fold = np.random.default_rng(0).permutation(samples) % FOLDS
    groups = {combination: [name for name in names if name.combination == combination] for combination in _used(names)}
    steps, taken = len(names) * (FOLDS + 1), 0
    for combination, members in groups.items():
        begun = time.perf_counter()
        fitted = _fit_combination(combination, validation)
        outputs = _combined_validation(fitted, validation)
        shared = time.perf_counter() - begun
        results = []
        for name in members:
            begun = time.perf_counter()
            policy = _fit(name, fitted, outputs)
            seconds = shared + time.perf_counter() - begun
            blank = np.empty((policy.points, samples), dtype=np.int16)
            results.append(CrossFitted(policy, blank, np.empty(blank.shape, dtype=bool), seconds))
            done((taken := taken + 1) / steps)
        for number in range(FOLDS):
            held, others = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
            if combination in (*FITTED, *LAPLACE):
                again = _fit_combination(combination, validation.rows(others), fitted)
                fitting, measured = (_combined_validation(again, validation.rows(rows)) for rows in (others, held))
            else:
                fitting, measured = outputs.rows(others), outputs.rows(held)
            right = measured.correct()
            for result in results:
                leaves = _fit(result.policy.name, fitted, fitting).rule.leave_at(measured.outputs)
                result.leaves[:, held], result.hits[:, held] = leaves, right[np.arange(len(held)), leaves]
                done((taken := taken + 1) / steps)
        yield from results


def _used(names: Sequence[PolicyName]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.combination for name in names))


def _fit_combination(
    name: str, validation: Validation, start: Combination | Laplace | None = None
) -> Combination | Laplace | None:
    if name == PLAIN:
        return None
    if name in LAPLACE:
        return fit_laplace(name, validation, start if isinstance(start, Laplace) else None)
    before = start if isinstance(start, Combination) else None
    return fit_combination(name, validation.logits, validation.labels, validation.costs, before)


def _combined(combination: Combination | Laplace | None, outputs: ExitOutputs) -> ExitOutputs:
    if combination is None:
        return outputs
    return ExitOutputs(combination(outputs) if isinstance(combination, Laplace) else combination(outputs.logits))


def _combined_validation(combination: Combination | Laplace | None, validation: Validation) -> Validation:
    return validation._replace(outputs=_combined(combination, validation.outputs))


def _fit(name: PolicyName, combination: Combination | Laplace | None, outputs: Validation) -> FittedPolicy:
    score = name.score or BASELINE.score
    return FittedPolicy(name, fit_validated(name.rule, outputs, score=score, **dict(name.fields)), combination)
