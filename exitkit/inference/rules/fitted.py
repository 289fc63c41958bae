"""The rule `fitted`: thresholds that maximise the reward on validation labels, by exact coordinate ascent.

There is no paper; this is the direct answer to "why not fit the thresholds to the labels". With the reward
r_ik = p_ik - price C_k of sample i at exit k, the thresholds T maximise

    J(T) = mean_i r_{i, leave(i)},   leave(i) = first k with s_ik >= T_k, else K-1

p_ik is the probability that exit k is right on i, by isotonic regression on the score (`soft`), or the outcome 0/1.
The candidates of each T_k are fixed beforehand: 50 quantiles of the scores of exit k, and infinity. A sweep goes from
exit K-2 down to 0 and sets T_k to the candidate with the largest sum of gains, over the samples that no earlier exit
takes; the gain is r_ik minus the reward at the exit where the sample leaves otherwise. Every step is an exact
maximisation over T_k, so that J never falls. Sweeps are repeated until no threshold changes, from two starts: the best
of the 40 operating points of `shares`, and one sweep in which no earlier exit takes a sample. The better end is kept.

It is the maximum along each T_k, not always the global one. The second start is not dynamic programming either: which
samples reach exit k depends on the earlier thresholds, so that the state is the set of samples.

One price is one operating point; there are 40, in descending order. A mean cost between two neighbouring points cannot
be had: the points are on the upper hull of accuracy against cost. Thresholds fitted to labels are optimistic on the
samples of the fit. No minimum number of samples is required to leave at an exit.

Shapes: N samples, K exits, G candidates other than infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from exitkit.inference.rules.base import Booleans, ThresholdRule, Validation
from exitkit.inference.rules.reward import isotonic, prices
from exitkit.inference.rules.shares import share_thresholds
from exitkit.inference.scores import patience_thresholds, scores
from exitkit.inference.thresholds import Floats, Integers

CANDIDATES = 50
SWEEPS = 50
_TIE = 1e-12
"""Sums of gains are equal if they differ by less than this per sample: rounding must not move a threshold."""


@dataclass(frozen=True, eq=False)
class FittedThresholds(ThresholdRule):
    """The rule `fitted`; see `ThresholdRule`."""

    name: ClassVar[str] = "fitted"


def candidates(score: ArrayLike, count: int = CANDIDATES) -> Floats:
    """Return at most `count` different values of the scores [N] of one exit, ascending, at evenly spaced ranks.

    The first is the lowest score, at which all samples leave.
    """
    ordered = np.sort(np.asarray(score, dtype=np.float64))
    return np.unique(ordered[len(ordered) * np.arange(count) // count])


def value(reward: Floats, leaves: Booleans) -> float:
    """Return J, from rewards [N, K] and whether each score reaches its exit's threshold, [N, K-1]."""
    at = np.where(leaves.any(axis=1), leaves.argmax(axis=1), reward.shape[1] - 1) if leaves.size else 0
    return float(reward[np.arange(len(reward)), at].mean())


def ascend(reward: Floats, rank: Integers, start: Integers, sizes: Integers) -> tuple[Integers, list[float]]:
    """Return the candidate of each exit, [K-1], after coordinate ascent, and J at the start and after each step.

    Args:
        reward: r, [N, K].
        rank: the number of candidates of exit k that each score reaches, [N, K-1]; the sample leaves there if that is
            above the index of the chosen candidate.
        start: indices of candidates, [K-1]; index `sizes[k]` is infinity.
        sizes: number of candidates of each exit other than infinity, [K-1].
    """
    chosen = start.copy()
    course = [value(reward, rank > chosen)]
    for _ in range(SWEEPS):
        before = chosen.copy()
        leaves = rank > chosen
        # Thresholds of earlier exits do not change before this sweep has passed them.
        taken = np.logical_or.accumulate(leaves, axis=1)
        otherwise = reward[:, -1]
        for k in range(len(chosen) - 1, -1, -1):
            alive = ~taken[:, k - 1] if k else np.ones(len(reward), dtype=bool)
            sums = _sums(reward[:, k] - otherwise, rank[:, k], alive, sizes[k])
            best = len(sums) - 1 - int(sums[::-1].argmax())
            if sums[best] > sums[chosen[k]] + _TIE * len(reward):
                chosen[k] = best
                course.append(value(reward, rank > chosen))
            otherwise = np.where(rank[:, k] > chosen[k], reward[:, k], otherwise)
        if (chosen == before).all():
            break
    return chosen, course


def _backward(reward: Floats, rank: Integers, sizes: Integers) -> Integers:
    """Return the candidates [K-1] of one backward sweep in which no earlier exit takes a sample."""
    chosen = np.empty_like(sizes)
    otherwise, everyone = reward[:, -1], np.ones(len(reward), dtype=bool)
    for k in range(len(sizes) - 1, -1, -1):
        sums = _sums(reward[:, k] - otherwise, rank[:, k], everyone, sizes[k])
        chosen[k] = len(sums) - 1 - int(sums[::-1].argmax())
        otherwise = np.where(rank[:, k] > chosen[k], reward[:, k], otherwise)
    return chosen


def _sums(gain: Floats, rank: Integers, alive: Booleans, size: int) -> Floats:
    """Return the sum of the gains of the samples that leave at each candidate, [size + 1]; at infinity, 0."""
    by_rank = np.bincount(rank, np.where(alive, gain, 0), minlength=size + 1)
    return np.append(np.cumsum(by_rank[:0:-1])[::-1], 0.0)


def fit(
    validation: Validation, score: str = "confidence", seed: int = 0, *, soft: bool = True, count: int = CANDIDATES
) -> FittedThresholds:
    """Return the rule; see `rules.fit_rule`.

    Args:
        validation: the outputs.
        score: one of `scores.SCORES`.
        seed: not used; the fit is deterministic.
        soft: whether rewards are made of probabilities instead of 0/1 outcomes.
        count: number of candidates of each threshold, next to infinity.

    Raises:
        UserError: the score is unknown, or a logit is not finite.
    """
    values, hits = scores(validation.logits, score), validation.correct()
    exits = values.shape[1]
    grids = [candidates(values[:, k], count) for k in range(exits - 1)]
    sizes = np.array([len(grid) for grid in grids], dtype=np.int64)
    rank = np.empty((len(values), exits - 1), dtype=np.int64)
    right = hits.astype(np.float64)
    for k in range(exits):
        if soft:
            right[:, k] = np.interp(values[:, k], *isotonic(values[:, k], hits[:, k]))
        if k < exits - 1:
            rank[:, k] = np.searchsorted(grids[k], values[:, k], side="right")
    family = patience_thresholds(exits) if score == "patience" else share_thresholds(values)
    starts = np.empty((len(family), exits - 1), dtype=np.int64)
    for k, grid in enumerate(grids):
        starts[:, k] = np.searchsorted(grid, family[:, k])
    price = prices(hits, validation.costs)
    limits = np.full((len(price), exits), -inf)
    for point, each in enumerate(price):
        reward = right - each * validation.costs
        nearest = max(starts, key=lambda start: value(reward, rank > start))
        ends = [ascend(reward, rank, start, sizes) for start in (nearest, _backward(reward, rank, sizes))]
        chosen = max(ends, key=lambda end: end[1][-1])[0]
        limits[point, :-1] = [[*grid, inf][index] for grid, index in zip(grids, chosen, strict=True)]
    return FittedThresholds(score, limits)
