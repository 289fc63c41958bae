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
samples of the fit. With `least`, an exit at which fewer samples leave is closed *after* the ascent, the one with the
fewest first, and the ascent goes on without it; as a filter of candidates the minimum would let J fall.

Shapes: N samples, K exits, G candidates other than infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import UserError
from exitkit.inference.rules.base import Booleans, ThresholdRule, Validation
from exitkit.inference.rules.reward import isotonic, prices
from exitkit.inference.rules.shares import share_thresholds
from exitkit.inference.scores import patience_thresholds
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
    return float(reward[np.arange(len(reward)), _exits(leaves)].mean())


def _exits(leaves: Booleans) -> Integers:
    """Return the exit where each sample leaves, [N], from whether each score reaches its exit's threshold, [N, K-1]."""
    last = np.full(len(leaves), leaves.shape[1])
    return np.where(leaves.any(axis=1), leaves.argmax(axis=1), last) if leaves.size else last


def ascend(
    reward: Floats, rank: Integers, start: Integers, sizes: Integers, closed: Sequence[int] = ()
) -> tuple[Integers, list[float]]:
    """Return the candidate of each exit, [K-1], after coordinate ascent, and J at the start and after each step.

    Args:
        reward: r, [N, K].
        rank: the number of candidates of exit k that each score reaches, [N, K-1]; the sample leaves there if that is
            above the index of the chosen candidate.
        start: indices of candidates, [K-1]; index `sizes[k]` is infinity.
        sizes: number of candidates of each exit other than infinity, [K-1].
        closed: exits whose threshold remains infinity.
    """
    chosen = start.copy()
    chosen[list(closed)] = sizes[list(closed)]
    course = [value(reward, rank > chosen)]
    for _ in range(SWEEPS):
        before = chosen.copy()
        leaves = rank > chosen
        # Thresholds of earlier exits do not change before this sweep has passed them.
        taken = np.logical_or.accumulate(leaves, axis=1)
        otherwise = reward[:, -1]
        for k in range(len(chosen) - 1, -1, -1):
            if k in closed:
                continue
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


def ascend_with_least(
    reward: Floats, rank: Integers, start: Integers, sizes: Integers, least: int
) -> tuple[Integers, float]:
    """Return the candidate of each exit, [K-1], and J, where at least `least` samples leave at every exit in use.

    After the ascent the exit at which the fewest samples leave, if these are too few, is closed, and the ascent goes
    on without it. Other arguments: see `ascend`.
    """
    closed: list[int] = []
    while True:
        chosen, course = ascend(reward, rank, start, sizes, closed)
        left = np.bincount(_exits(rank > chosen), minlength=len(chosen) + 1)[:-1]
        few = np.flatnonzero((left > 0) & (left < least))
        if not len(few):
            return chosen, course[-1]
        closed.append(int(few[left[few].argmin()]))
        start = chosen


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
    validation: Validation, score: str = "confidence", *, soft: bool = True, count: int = CANDIDATES, least: int = 0
) -> FittedThresholds:
    """Return the rule; see `rules.fit_rule`.

    Args:
        validation: the outputs.
        score: one of `scores.SCORES`.
        soft: whether rewards are made of probabilities instead of 0/1 outcomes.
        count: number of candidates of each threshold, next to infinity.
        least: number of validation samples that leave at least at every exit in use other than the last.

    Raises:
        UserError: the score is unknown, count is below 1 or least negative, or a logit is not finite.
    """
    if count < 1:
        raise UserError(f"count is {count}; expected at least 1 candidate of each threshold")
    if least < 0:
        raise UserError(f"least is {least}; expected 0 or more samples that leave at an exit")
    values, hits = validation.outputs.scores(score), validation.correct()
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
    at = [_exits(rank > start) for start in starts]
    starts_right = np.array([right[np.arange(len(right)), exits_at].mean() for exits_at in at])
    starts_cost = np.array([validation.costs[exits_at].mean() for exits_at in at])
    price = prices(hits, validation.costs)
    limits = np.full((len(price), exits), -inf)
    for point, each in enumerate(price):
        reward = right - each * validation.costs
        nearest = starts[(starts_right - each * starts_cost).argmax()]
        starts_here = (nearest, _backward(reward, rank, sizes))
        ends = [ascend_with_least(reward, rank, start, sizes, least) for start in starts_here]
        chosen = max(ends, key=lambda end: end[1])[0]
        limits[point, :-1] = [[*grid, inf][index] for grid, index in zip(grids, chosen, strict=True)]
    return FittedThresholds(score, limits)
