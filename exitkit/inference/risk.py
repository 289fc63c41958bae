"""Risk control: the lowest-cost operating point whose risk against the full network is guaranteed.

The risk of an operating point is the mean of a loss per sample: how much worse the exit e where the sample leaves is
than the last exit f, the full network. With class probabilities p, predicted classes c and the label y, the losses are

- gap: 1[c_e != y] - 1[c_f != y], the loss of accuracy, in -1..1.
- consistency: 1[c_e != c_f]; at least the gap, sample by sample.
- brier: (|p_e - onehot(y)|^2 - |p_f - onehot(y)|^2) / 2, in -1..1.
- brier-top: the same with onehot(c_f) in place of onehot(y).
- hellinger: |sqrt(p_e) - sqrt(p_f)| / sqrt(2), in 0..1.

consistency, brier-top and hellinger need no labels. The risks are those of "Fast yet Safe" (Jazbec et al., NeurIPS
2024, https://arxiv.org/abs/2405.20915), with the Brier scores halved, so that every loss is at most 1.

Controls, at level epsilon:

- betting, binomial, hoeffding-bentkus: with probability 1 - delta, the risk is below epsilon. Learn then Test
  (Angelopoulos et al., 2021, https://arxiv.org/abs/2110.01052) by fixed-sequence testing: points are tested in
  descending order of cost, each at level delta, until the first that does not pass. The p-values are from betting
  (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024), from the binomial
  distribution (losses 0 and 1), or from the inequalities of Hoeffding and Bentkus (losses in 0..1). The last two do
  not depend on the order of the samples, and count a negative loss as 0, which can only raise the p-value.
- crc: conformal risk control (Angelopoulos et al., ICLR 2024). The *expected* loss of the chosen point on a new sample,
  over the draw of all samples, is at most epsilon. Losses must grow along the path of points: each sample's is replaced
  by its largest at this point and all higher-cost ones.
- naive: the mean loss on the samples is below epsilon, without a guarantee.

A point passes only if all higher-cost points pass. The released code of "Fast yet Safe" returns the first point that
does *not* pass in Learn then Test, and, in conformal risk control, the lowest-cost one of those that pass.

Control per exit: for every exit k, the mean loss of the samples that leave at exit k or before is below epsilon (in the
spirit of Ringel et al., ICML 2024, https://arxiv.org/abs/2402.00857). A point passes if all its exits pass at level
delta. No correction for the number of exits is needed: a point with an exit whose risk is epsilon or more passes only
if that exit does, with probability delta at most.

The operating points (their thresholds, and the costs that order them) must have been chosen on *other* samples than
those of the losses; on the same samples no guarantee holds.

Shapes: N samples, K exits, C classes, P operating points. Exits are indexed from 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from math import ceil, inf, log, log1p

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exitkit.errors import UserError, unknown
from exitkit.inference.calibration import checked_labels
from exitkit.inference.scores import below_top, probabilities
from exitkit.inference.thresholds import Floats

Booleans = NDArray[np.bool_]

RISKS = ("gap", "consistency", "brier", "brier-top", "hellinger")
"""Names of the risks."""
LABELLED = ("gap", "brier")
"""Risks that need labels."""
TESTS = ("betting", "binomial", "hoeffding-bentkus")
"""Controls that hold with probability 1 - delta."""
CONTROLS = (*TESTS, "crc", "naive")
"""Names of the controls."""
BOLDEST = 0.75
"""c, the largest share of the capital that one sample may lose; the paper uses 1/2 or 3/4."""


def exit_losses(risk: str, logits: ArrayLike, labels: ArrayLike | None = None) -> Floats:
    """Return the loss of each exit against the last one, [N, K], in -1..1.

    Args:
        risk: one of `RISKS`.
        logits: [N, K, C]; log-probabilities of a combination will do, and -infinity excludes a class.
        labels: classes [N], for the risks in `LABELLED`; the others ignore them.

    Raises:
        UserError: the risk is unknown or needs labels, shapes do not agree, or a logit is NaN or +infinity.
    """
    if risk not in RISKS:
        raise unknown("risk", risk, RISKS)
    outputs = np.asarray(logits)
    if outputs.ndim != 3 or not outputs.size:
        raise UserError(f"logits have the shape {outputs.shape}; expected [N, K, C], none of them 0")
    samples, exits, _ = outputs.shape
    predicted = outputs.argmax(axis=2)
    target = predicted[:, -1]
    if risk in LABELLED:
        if labels is None:
            free = ", ".join(name for name in RISKS if name not in LABELLED)
            raise UserError(f"the risk {risk} needs labels; without them: {free}")
        target = checked_labels(labels, outputs)
    if risk in ("gap", "consistency"):
        for k in range(exits):
            below_top(outputs[:, k], k + 1)  # the error for logits that are not finite
        wrong: Floats = (predicted != target[:, None]).astype(np.float64)
        return np.subtract(wrong, wrong[:, -1:], dtype=np.float64) if risk == "gap" else wrong
    result = np.empty((samples, exits))
    full = probabilities(outputs[:, -1], exits)
    for k in range(exits):
        p = probabilities(outputs[:, k], k + 1)
        if risk == "hellinger":
            result[:, k] = np.sqrt(((np.sqrt(p) - np.sqrt(full)) ** 2).sum(axis=1) / 2)
        else:
            # |p - onehot(t)|^2 / 2 without its constant 1 / 2, which cancels.
            result[:, k] = (p**2).sum(axis=1) / 2 - p[np.arange(samples), target]
    if risk != "hellinger":
        result -= result[:, -1:].copy()
    # The distance of distributions without a common class may round to above 1.
    return np.clip(result, -1, 1)


def losses_at(exit_losses: ArrayLike, exit_index: ArrayLike) -> Floats:
    """Return the losses of operating points, [P, N], from those of exits [N, K] and where samples leave [P, N]."""
    values, leaves = np.asarray(exit_losses, dtype=np.float64), np.asarray(exit_index)
    result: Floats = values[np.arange(len(values)), leaves]
    return result


def betting_p_values(drops: ArrayLike, limit: float, delta: float = 0.1) -> Floats:
    """Return the p-value of "the mean drop is `limit` or more" for each row, [P], from drops [P, N] in -1..1.

    The test bets that drops are below the limit. With X = (drop + 1) / 2 and m = (limit + 1) / 2, the capital after n
    samples is prod_t (1 + lambda_t (m - X_t)). Under the null hypothesis its expectation does not grow, so that it
    reaches 1 / p with probability at most p (Ville's inequality): the p-value is 1 divided by the largest capital. The
    bets are the paper's predictable plug-in, lambda_t = min(sqrt(2 log(1 / delta) / (N v_{t-1})), c / (1 - m)), where
    v_{t-1} is the variance of the samples before t and of one artificial sample of mean 1/2 and variance 1/4. As
    lambda_t (1 - m) <= c < 1, no sample can lose the whole capital.

    The drops of a row must be independent draws *in the given order*: sorted samples, for example by class, must be
    shuffled first.

    Args:
        drops: differences of two accuracies, [P, N], -1..1.
        limit: -1..1.
        delta: level for which the bets are chosen; other levels may be tested, with less power.

    Raises:
        UserError: the limit or a drop is outside -1..1, or delta outside (0, 1).
    """
    _check_share("delta", delta)
    if not -1 <= limit <= 1:
        raise UserError(f"the limit of the drop is {limit}; expected -1..1")
    x = (np.asarray(drops, dtype=np.float64) + 1) / 2
    if not ((x >= 0) & (x <= 1)).all():
        raise UserError("drops outside -1..1; expected differences of two accuracies")
    m, samples = (limit + 1) / 2, x.shape[1]
    counts = np.arange(2, samples + 2)
    mean = (0.5 + np.cumsum(x, axis=1)) / counts
    variance = (0.25 + np.cumsum((x - mean) ** 2, axis=1)) / counts
    # A bet may depend on earlier samples only.
    variance = np.concatenate([np.full((len(x), 1), 0.25), variance[:, :-1]], axis=1)[:, :samples]
    largest = BOLDEST / (1 - m) if m < 1 else np.inf
    bets = np.minimum(np.sqrt(2 * log(1 / delta) / (max(samples, 1) * variance)), largest)
    # In logarithms, as the capital may exceed the float64 range; before the first sample it is 1.
    capital = np.cumsum(np.log1p(bets * (m - x)), axis=1)
    p: Floats = np.exp(-capital.max(axis=1, initial=0.0))
    return p


def binomial_p_values(losses: ArrayLike, limit: float, counted: ArrayLike | None = None) -> Floats:
    """Return the p-value of "the mean loss is `limit` or more" for each row, [P], from losses 0 and 1, [P, N].

    With S the sum of n independent losses, p = P(Binomial(n, limit) <= S): exact, and for any order of the samples.

    Args:
        losses: 0 and 1, [P, N]; a negative one counts as 0.
        limit: 0..1.
        counted: whether a sample counts, [P, N]; None: all do.

    Raises:
        UserError: the limit is outside 0..1, or a loss is another number.
    """
    # Imported when used: betting needs no scipy.
    from scipy.special import bdtr

    values, kept = _non_negative(losses, limit, counted)
    if not ((values == 0) | (values == 1)).all():
        raise UserError("losses other than 0 and 1; the binomial test needs consistency or gap, see hoeffding-bentkus")
    p: Floats = bdtr((values * kept).sum(axis=1), kept.sum(axis=1), limit)
    return p


def hoeffding_bentkus_p_values(losses: ArrayLike, limit: float, counted: ArrayLike | None = None) -> Floats:
    """Return the p-value of "the mean loss is `limit` or more" for each row, [P], from losses in 0..1, [P, N].

    With S the sum of n independent losses and kl the relative entropy of two biased coins,
    p = min(exp(-n kl(min(S / n, limit), limit)), e P(Binomial(n, limit) <= ceil(S)), 1).

    Args:
        losses: up to 1, [P, N]; a negative one counts as 0.
        limit, counted: see `binomial_p_values`.

    Raises:
        UserError: the limit is outside 0..1, or a loss is above 1 or NaN.
    """
    # Imported when used: betting needs no scipy.
    from scipy.special import bdtr, rel_entr

    values, kept = _non_negative(losses, limit, counted)
    total, n = (values * kept).sum(axis=1), kept.sum(axis=1)
    low = np.minimum(total, n * limit)
    hoeffding = np.exp(-(rel_entr(low, n * limit) + rel_entr(n - low, n * (1 - limit))))
    bentkus = np.e * bdtr(np.ceil(total), n, limit)
    p: Floats = np.minimum(np.minimum(hoeffding, bentkus), 1.0)
    return p


def _non_negative(losses: ArrayLike, limit: float, counted: ArrayLike | None) -> tuple[Floats, Booleans]:
    if not 0 <= limit <= 1:
        raise UserError(f"the limit of the loss is {limit}; expected 0..1")
    values = np.maximum(_checked_losses(losses), 0)
    kept = np.ones(values.shape, dtype=bool) if counted is None else np.asarray(counted, dtype=bool)
    return values, kept


_SEARCHED = 100_000  # samples, up to which the smallest number that suffices is searched


def p_values(
    test: str, losses: ArrayLike, epsilon: float, delta: float = 0.1, counted: ArrayLike | None = None
) -> Floats:
    """Return the p-value of "the mean loss is epsilon or more" for each row, [P], from losses [P, N] in -1..1.

    Args:
        test: one of `TESTS`.
        losses: for betting, independent draws in the given order.
        epsilon: in (0, 1].
        delta: level for which the bets are chosen.
        counted: whether a sample counts, [P, N]; None: all do. May depend on the sample, but on no other.
    """
    if test not in TESTS:
        raise unknown("test", test, TESTS)
    if test == "binomial":
        return binomial_p_values(losses, epsilon, counted)
    if test == "hoeffding-bentkus":
        return hoeffding_bentkus_p_values(losses, epsilon, counted)
    values = _checked_losses(losses)
    if counted is None:
        return betting_p_values(values, epsilon, delta)
    # E[loss | counted] >= epsilon just where E[(loss - epsilon) 1[counted]] >= 0; divided by 1 + epsilon for -1..1.
    return betting_p_values((values - epsilon) / (1 + epsilon) * np.asarray(counted, dtype=bool), 0.0, delta)


def samples_needed(test: str, epsilon: float, delta: float, *, per_exit: bool = False) -> int:
    """Return the smallest number of samples with which a test can pass at all if no loss is negative.

    With all losses 0, the p-value of n samples is (1 - epsilon)^n. That of betting is at least 1 / (1 + c epsilon /
    (1 - epsilon))^n, the value at the largest bet; the number is searched from there on, up to 100,000 samples, beyond
    which the result is this lower bound. Per exit, where n samples count, it is that of the largest bet, 1 / (1 + c
    epsilon / (1 + epsilon))^n: a lower bound, too.

    Args:
        test: one of `TESTS`.
        epsilon, delta: see `controlled_point`.
        per_exit: whether the risk is controlled per exit.
    """
    _check_levels(epsilon, delta)
    if test not in TESTS:
        raise unknown("test", test, TESTS)
    if test == "betting" and per_exit:
        rate = log1p(BOLDEST * epsilon / (1 + epsilon))
    elif epsilon == 1:
        rate = inf
    else:
        rate = log1p(BOLDEST * epsilon / (1 - epsilon)) if test == "betting" else -log1p(-epsilon)
    least = max(1, ceil(min(log(1 / delta) / rate, 1e15)))
    if test == "betting" and not per_exit and least <= _SEARCHED:
        passes = partial(_perfect_pass, epsilon, delta)
        return least + bisect_left(range(least, 20 * least), True, key=passes)
    return least


def _perfect_pass(epsilon: float, delta: float, samples: int) -> bool:
    return bool(betting_p_values(np.zeros((1, samples)), epsilon, delta)[0] <= delta)


def exits_to_control(test: str, rates: ArrayLike, samples: int, epsilon: float, delta: float) -> Booleans:
    """Return the exits of each point at which enough samples are expected to have left, [P, K]; the last always.

    An exit at which fewer than `samples_needed` leave, together with all before it, cannot pass. Its samples are then
    controlled together with those of the next exit. The rates must be those of *other* samples than the losses, for
    example of the ones that the thresholds were fitted to: a choice of exits on the same samples voids the guarantee.

    Args:
        test: one of `TESTS`.
        rates: share of the samples that leave at each exit, [P, K]; see `thresholds.realised`.
        samples: number of samples of the losses, N.
        epsilon, delta: see `controlled_point`.
    """
    needed = samples_needed(test, epsilon, delta, per_exit=True)
    # Rounding must not lose a sample of a count that is whole.
    left = np.cumsum(np.asarray(rates, dtype=np.float64), axis=1) * samples + 1e-6
    enough: Booleans = left >= needed
    enough[:, -1] = True
    return enough


def controlled_point(
    losses: ArrayLike,
    cost: ArrayLike,
    epsilon: float,
    delta: float = 0.1,
    control: str = "betting",
    *,
    exit_index: ArrayLike | None = None,
    exits: ArrayLike | None = None,
    seed: int = 0,
) -> int | None:
    """Return the lowest-cost operating point whose risk is controlled, or None: then use the full network.

    Args:
        losses: [P, N], in -1..1; see `losses_at`.
        cost: [P], planned or measured on other samples.
        epsilon: risk that is accepted, in (0, 1].
        delta: probability of a wrong choice that is accepted, in (0, 1); crc and naive do not depend on it.
        control: one of `CONTROLS`.
        exit_index: exits where the samples leave, [P, N], for control per exit, by one of `TESTS`.
        exits: the exits to control, bool [P, K]; see `exits_to_control`. None: all, so that a point passes only if
            enough samples leave at the first exit already; a point that no sample leaves early and without losses is
            taken for the full network, which has no exit to control: it is left out of the sequence of tests.
        seed: seed of the order of the samples, which betting depends on; data sets are often sorted by class, and
            sorted samples are not independent draws.

    Raises:
        UserError: the control is unknown, or not one of `TESTS` per exit; epsilon, delta or a loss is out of range;
            shapes do not agree.
    """
    if control not in CONTROLS:
        raise unknown("risk control", control, CONTROLS)
    _check_levels(epsilon, delta)
    values, price = _checked_losses(losses), np.asarray(cost, dtype=np.float64)
    points, samples = values.shape
    if price.shape != (points,):
        raise UserError(f"costs have the shape {price.shape}; expected ({points},), one per operating point")
    if exit_index is None and exits is not None:
        raise UserError("exits to control are given without exit_index; expected where each sample leaves, [P, N]")
    order = np.argsort(-price, kind="stable")
    if exit_index is not None and exits is None and points:
        early = (np.asarray(exit_index) < np.max(exit_index, initial=0)).any(axis=1) | values.any(axis=1)
        order = order[early[order]]
    if exit_index is not None:
        passes = _pass_per_exit(values, np.asarray(exit_index), exits, epsilon, delta, control, seed)[order]
    elif control == "crc":
        worst = np.maximum.accumulate(values[order], axis=0).sum(axis=1)
        passes = (worst + 1) / (samples + 1) <= epsilon
    elif control == "naive":
        passes = values[order].sum(axis=1) < epsilon * samples
    else:
        passes = p_values(control, values[:, _shuffled(samples, seed)], epsilon, delta)[order] <= delta
    passed = int(np.logical_and.accumulate(passes).sum())
    return int(order[passed - 1]) if passed else None


def _pass_per_exit(
    losses: Floats,
    exit_index: np.ndarray,
    exits: ArrayLike | None,
    epsilon: float,
    delta: float,
    control: str,
    seed: int,
) -> Booleans:
    """Return whether each point passes at all its exits, [P]."""
    if control not in TESTS:
        raise UserError(f"{control} does not control the risk per exit; expected one of {', '.join(TESTS)}")
    if exit_index.shape != losses.shape:
        raise UserError(f"exit_index has the shape {exit_index.shape}; expected that of the losses, {losses.shape}")
    # At exits beyond the last one that is used, the samples are the same.
    last = int(exit_index.max(initial=0)) + 1
    wanted = np.ones((len(losses), last), dtype=bool) if exits is None else np.asarray(exits, dtype=bool)
    if wanted.ndim != 2 or len(wanted) != len(losses) or wanted.shape[1] < last or not wanted.any(axis=1).all():
        raise UserError(f"exits to control have the shape {wanted.shape}; expected [P, K], one or more for each point")
    order = _shuffled(losses.shape[1], seed)
    values, leaves = losses[:, order], exit_index[:, order]
    passes = np.ones(len(losses), dtype=bool)
    for k in range(wanted.shape[1]):
        rows = np.flatnonzero(wanted[:, k])
        passes[rows] &= p_values(control, values[rows], epsilon, delta, leaves[rows] <= k) <= delta
    return passes


def controlled_points(
    losses: ArrayLike,
    cost: ArrayLike,
    epsilons: Sequence[float],
    delta: float = 0.1,
    control: str = "betting",
    *,
    jointly: bool = False,
    exit_index: ArrayLike | None = None,
    exits: ArrayLike | None = None,
    seed: int = 0,
) -> list[int | None]:
    """Return `controlled_point` for each of several levels epsilon, each by its own sequence of tests.

    Args:
        losses, cost, delta, control, exit_index, exits, seed: see `controlled_point`.
        epsilons: the levels.
        jointly: whether *all* choices are right with probability 1 - delta; each is then tested at delta divided by
            their number. Otherwise each alone is.
    """
    each = delta / len(epsilons) if jointly and len(epsilons) else delta
    return [
        controlled_point(losses, cost, epsilon, each, control, exit_index=exit_index, exits=exits, seed=seed)
        for epsilon in epsilons
    ]


def risk_controlled(
    correct_full: ArrayLike, correct_leaving: ArrayLike, cost: ArrayLike, epsilon: float, delta: float, seed: int = 0
) -> int | None:
    """Return the lowest-cost operating point that loses less than epsilon of the full network's accuracy, or None.

    With probability 1 - delta over the samples, the true accuracy at the returned point is below the full network's by
    less than epsilon. Points are tested in descending order of cost, each at level delta, until the first that does
    not pass; the probability of an error in this sequence is at most delta, for any number of points. None: the
    highest-cost point does not pass.

    The operating points (their thresholds, and the costs that order them) must have been chosen on *other* samples
    than these; on the same samples the guarantee does not hold.

    Args:
        correct_full: whether the full network is right, [N].
        correct_leaving: whether each sample is right at the exit where it leaves, [P, N].
        cost: [P], planned or measured on other samples.
        epsilon: loss of accuracy that is accepted, in (0, 1].
        delta: probability of a wrong choice that is accepted, in (0, 1).
        seed: seed of the order of the samples; data sets are often sorted by class, and sorted samples are not
            independent draws.

    Raises:
        UserError: epsilon or delta is outside its range.
    """
    drops = np.asarray(correct_full, dtype=np.float64) - np.asarray(correct_leaving, dtype=np.float64)
    return controlled_point(drops, cost, epsilon, delta, seed=seed)


def _shuffled(samples: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(samples)


def _checked_losses(losses: ArrayLike) -> Floats:
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 2:
        raise UserError(f"losses have the shape {values.shape}; expected [P, N]")
    if not ((values >= -1) & (values <= 1)).all():
        raise UserError("losses outside -1..1")
    return values


def _check_levels(epsilon: float, delta: float) -> None:
    if not 0 < epsilon <= 1:
        raise UserError(f"epsilon is {epsilon}; expected a risk above 0 and up to 1")
    _check_share("delta", delta)


def _check_share(what: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{what} is {value}; expected a probability between 0 and 1, both excluded")
