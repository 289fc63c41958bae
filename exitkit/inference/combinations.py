"""Combinations: an exit predicts from its own output and those of the exits before it.

A combination maps the logits z of all exits to log-probabilities, before scores, thresholds and rules read them. Exit k
reads the exits 0..k only, so that a combination needs nothing of the network beyond exit k. With p_j = softmax(z_j),
the output q_k of exit k is:

- calibrated: q_k = softmax(z_k / T_k), temperature scaling (Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599).
- product: q_k ∝ prod_{j <= k} max(z_j, 0)^((j + 1) / K), the product anytime ensemble (Jazbec et al., NeurIPS 2023,
  https://arxiv.org/abs/2306.02652). Classes without a positive logit are excluded. Where no class is left, the exit and
  all later ones keep the output of the exit before. Where exit 0 has no positive logit, all exits give softmax(z_0).
- caching: q_k = p_j of the exit j <= k whose largest probability is largest, the first of several (same paper).
- geometric: q_k ∝ exp(b_k) prod_{j <= k} p_j^(w_kj / (k + 1)), w_kj >= 0 (Zero Time Waste, Wolczyk et al., NeurIPS
  2021, https://arxiv.org/abs/2106.05409).
- additive: q_k ∝ sum_{j <= k} w_kj p_j + b_k, w_kj > 0, b_k > 0 (same paper; its exp(b) is b here).
- mean: q_k = sum_{j <= k} p_j / (k + 1).
- mie: q_k ∝ sum_{j <= k} C_j softmax(z_j / T_j), model-internal ensembling, with the cumulative cost C_j of exit j
  (Meronen et al., WACV 2024, https://arxiv.org/abs/2302.06359). The paper also has a Laplace approximation of the last
  layers, which needs their inputs and is not part of this module.

calibrated, geometric, additive and mie are fitted to validation labels by negative log-likelihood (NLL), exit by exit:

- calibrated: T_k minimises the NLL of q_k; see `calibration.fit_temperatures`.
- geometric: NLL + RIDGE (|w_k - 1|^2 + |b_k|^2) is convex in w_k [k + 1] and b_k [C], and is minimised by bounded
  L-BFGS. The released code learns log w by 501 epochs of Adam on *training* logits. With more than `BIASED_CLASSES`
  classes, b_k = 0.
- additive: scaled to sum_j w_kj + sum_c b_kc = 1, the output is a mixture of the exits and of the classes themselves,
  and its NLL is convex in the weights. Newton's method finds the minimum with the logarithm of each weight as a
  barrier: each exit counts as one more sample, and all classes together as one. The released code learns log w and
  log b as above, and adds 1e-6 to each probability instead of the barrier.
- mie: T_k minimises the NLL of q_k with T_0..T_{k-1} fixed. The released code searches a grid of ten temperatures; here
  a grid is refined continuously.

Shapes: N samples, K exits, C classes. Exits are indexed from 0. Log-probabilities are float64, and -infinity for an
excluded class.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite, log
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from exitkit.errors import UserError, unknown
from exitkit.inference.as_json import parsed, reading
from exitkit.inference.calibration import HIGHEST, LOWEST, checked_labels, fit_temperatures
from exitkit.inference.scores import below_top, checked_temperatures
from exitkit.inference.thresholds import Floats, Integers

if TYPE_CHECKING:
    from torch import Tensor

COMBINATIONS = ("calibrated", "product", "caching", "geometric", "additive", "mean", "mie")
"""Names of the combinations."""
FITTED = ("calibrated", "geometric", "additive", "mie")
"""Names of the combinations that are fitted to labels; the others are the same for all validation samples."""

RIDGE = 1e-3
"""Pull of the weights of `geometric` towards 1, and of its biases towards 0."""
BIASED_CLASSES = 200
"""Largest number of classes for which `geometric` has biases; 1000 would overfit a validation set."""
_WEIGHTED = ("geometric", "additive")
_STEPS = 100
_GRID = 13

Rows = tuple[tuple[float, ...], ...]


_MOST_EXITS = 1000
_FORM = {
    "name": str,
    "exits": int,
    "weights": list[list[float]],
    "biases": list[list[float]],
    "temperatures": list[float],
}
"""The fields of a combination in JSON, and their types."""


@dataclass(frozen=True)
class Combination:
    """A map of the logits of all exits to log-probabilities; see `fit_combination`.

    Args:
        name: one of `COMBINATIONS`.
        exits: number of exits, K.
        weights: for geometric and additive, row k has the weights of the exits 0..k in the output of exit k; for mie,
            one row, the cost of each exit; else none.
        biases: for geometric and additive, row k has the bias of each class at exit k, [K, C]; geometric may have none.
        temperatures: for mie and calibrated, by which the logits of each exit are divided, [K].

    Raises:
        UserError: the name is unknown, a number is missing or superfluous, or a weight is out of range.
    """

    name: str
    exits: int
    weights: Rows = ()
    biases: Rows = ()
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in COMBINATIONS:
            raise unknown("combination", self.name, COMBINATIONS)
        if not 1 <= self.exits <= _MOST_EXITS:
            raise UserError(f"a combination of {self.exits} exits; expected 1 to {_MOST_EXITS}")
        expected: tuple[int, ...] = (self.exits,) if self.name == "mie" else ()
        if self.name in _WEIGHTED:
            expected = tuple(range(1, self.exits + 1))
        lengths = tuple(map(len, self.weights))
        if lengths != expected:
            raise UserError(f"{self.name} has rows of {list(lengths)} weights; expected {list(expected)}")
        lowest = 0.0 if self.name == "geometric" else np.nextafter(0, 1)
        if not all(isfinite(value) and value >= lowest for row in self.weights for value in row):
            raise UserError(f"a weight of {self.name} is not a {'positive number' if lowest else 'number from 0'}")
        widths = {len(row) for row in self.biases}
        wanted = {"geometric": (0, self.exits), "additive": (self.exits,)}.get(self.name, (0,))
        if len(self.biases) not in wanted or len(widths) > 1 or 0 in widths:
            raise UserError(
                f"{self.name} has {len(self.biases)} rows of biases; expected {wanted[-1]}, of equal length"
            )
        if not all(isfinite(value) and (value > 0 or self.name == "geometric") for row in self.biases for value in row):
            raise UserError(f"a bias of {self.name} is not a finite number, or not positive")
        if self.name in ("mie", "calibrated"):
            checked_temperatures(self.temperatures, self.exits)
        elif self.temperatures:
            raise UserError(f"{self.name} has no temperatures")

    def __call__(self, logits: ArrayLike) -> Floats:
        """Return the log-probabilities of each exit, [N, K, C] in float64, from logits [N, K, C].

        Raises:
            UserError: the logits have another number of exits, or classes, or are not finite.
        """
        outputs = np.asarray(logits)
        if outputs.ndim != 3 or outputs.shape[1] != self.exits:
            raise UserError(f"logits have the shape {outputs.shape}; expected [N, {self.exits}, C]")
        result = np.empty(outputs.shape)
        carry: Any = None
        for k in range(self.exits):
            result[:, k], carry = self._step_on_cpu(k, outputs[:, k], carry)
        return result

    def step(self, k: int, logits: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        """Return the log-probabilities of exit k, [N, C] in float64, and the carry for the next exit.

        On the CPU they equal those of `__call__` bit for bit; on other devices the last digits may differ.

        Args:
            k: the exit; all exits before it must have been stepped through.
            logits: its logits [N, C].
            carry: the carry returned for the exit before, a tuple of tensors [N, C], without the rows of samples that
                left; None at the first exit.

        Raises:
            UserError: the logits are not finite (on other devices than the CPU, the log-probabilities are then NaN), or
                have another number of classes.
        """
        # Imported when used: evaluation of stored outputs need not load torch.
        import torch

        values = logits.detach().double()
        if not values.is_cpu:
            return self._advance(torch, k, values, carry)
        before = None if carry is None else tuple(part.numpy() for part in carry)
        result, after = self._step_on_cpu(k, values.numpy(), before)
        return torch.from_numpy(result), tuple(map(torch.from_numpy, after))

    def _step_on_cpu(self, k: int, logits: np.ndarray, carry: Any) -> tuple[Floats, Any]:
        # In C order, so that the order of summation does not depend on the layout of the logits.
        z = np.array(logits, dtype=np.float64, order="C")
        if not np.isfinite(z.max(axis=1)).all():
            raise UserError(f"the logits of exit {k + 1} are not finite; a combination needs finite outputs")
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return self._advance(np, k, z, carry)

    def _advance(self, xp: Any, k: int, z: Any, carry: Any) -> tuple[Any, Any]:
        """Return `step` of float64 arrays; `xp` is numpy or torch: all functions used have one signature."""
        if self.biases and z.shape[1] != len(self.biases[0]):
            raise UserError(f"the logits have {z.shape[1]} classes; {self.name} was fitted to {len(self.biases[0])}")
        return _ADVANCE[self.name](self, xp, k, z, carry)

    def to_json(self) -> str:
        """Return the combination as JSON."""
        values = {"name": self.name, "exits": self.exits, "weights": self.weights, "biases": self.biases}
        return json.dumps({**values, "temperatures": self.temperatures})

    @classmethod
    def from_json(cls, text: str) -> Combination:
        """Return the combination of a text that `to_json` returned; other keys are ignored.

        Raises:
            UserError: the text is not a combination.
        """
        with reading(text, "a combination"):
            values = parsed(text, _FORM)
            weights, biases = (tuple(tuple(map(float, row)) for row in values[key]) for key in ("weights", "biases"))
            return cls(values["name"], values["exits"], weights, biases, tuple(map(float, values["temperatures"])))


def fit_combination(
    name: str, logits: ArrayLike, labels: ArrayLike, costs: ArrayLike, start: Combination | None = None
) -> Combination:
    """Return the combination fitted to validation outputs.

    Args:
        name: one of `COMBINATIONS`.
        logits: validation logits [N, K, C]; -infinity excludes a class.
        labels: their classes [N], 0..C-1; product, caching and mean do not depend on them.
        costs: cumulative cost of each exit, [K], positive; only mie depends on them.
        start: a combination of this name, exits and classes, from which geometric and additive, whose minima are
            unique, start their search; None: equal weights.

    Raises:
        UserError: the name is unknown, shapes do not agree, a logit is NaN or +infinity, a cost is not positive, or an
            exit excludes a right class, so that nothing can be fitted.
    """
    if name not in COMBINATIONS:
        raise unknown("combination", name, COMBINATIONS)
    outputs, price = np.asarray(logits), np.asarray(costs, dtype=np.float64)
    if outputs.ndim != 3 or not outputs.size:
        raise UserError(f"logits have the shape {outputs.shape}; expected [N, K, C], none of them 0")
    right, exits = checked_labels(labels, outputs), outputs.shape[1]
    if price.shape != (exits,) or not (np.isfinite(price) & (price > 0)).all():
        raise UserError(f"costs are {price.tolist()}; expected {exits} positive numbers, one per exit")
    if name == "mie":
        return Combination(name, exits, (tuple(price.tolist()),), (), _fit_mie(outputs, right, price))
    if name == "calibrated":
        return Combination(name, exits, temperatures=tuple(fit_temperatures(outputs, right).tolist()))
    if name not in FITTED:
        return Combination(name, exits)
    fit = _fit_geometric if name == "geometric" else _fit_additive
    weights, biases = fit(outputs, right, start)
    return Combination(name, exits, weights, biases)


def _log_softmax(xp: Any, z: Any) -> Any:
    shifted = z - xp.amax(z, axis=1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))


def _add_logs(xp: Any, a: Any, b: Any) -> Any:
    """Return log(e^a + e^b); several times faster than logaddexp, which is not vectorised."""
    top = xp.maximum(a, b)
    # Where both are -infinity, nothing is added.
    base = xp.where(top == -xp.inf, xp.zeros_like(top), top)
    return base + xp.log(xp.exp(a - base) + xp.exp(b - base))


def _calibrated(combination: Combination, xp: Any, k: int, z: Any, carry: Any) -> tuple[Any, Any]:
    return _log_softmax(xp, z / combination.temperatures[k]), ()


def _product(combination: Combination, xp: Any, k: int, z: Any, carry: Any) -> tuple[Any, Any]:
    # carry: the sum of weighted logarithms, and the output of the exit before.
    total = (k + 1) / combination.exits * xp.log(xp.where(z <= 0, xp.zeros_like(z), z))
    previous = _log_softmax(xp, z)
    if carry is not None:
        total, previous = carry[0] + total, carry[1]
    # A class that is excluded once stays excluded: a sum with -inf is -inf.
    empty = xp.amax(total, axis=1, keepdims=True) == -xp.inf
    output = xp.where(empty, previous, _log_softmax(xp, total))
    return output, (total, output)


def _caching(combination: Combination, xp: Any, k: int, z: Any, carry: Any) -> tuple[Any, Any]:
    output = _log_softmax(xp, z)
    if carry is not None:
        (before,) = carry
        keeps = xp.amax(before, axis=1, keepdims=True) >= xp.amax(output, axis=1, keepdims=True)
        output = xp.where(keeps, before, output)
    return output, (output,)


def _averaged(combination: Combination, xp: Any, k: int, z: Any, carry: Any) -> tuple[Any, Any]:
    # carry: the logarithm of the weighted sum of probabilities, which may be below the range of float64.
    weights, temperature = (1.0,) * combination.exits, 1.0
    if combination.name == "mie":
        (weights,), temperature = combination.weights, combination.temperatures[k]
    total = _log_softmax(xp, z / temperature) + log(weights[k])
    if carry is not None:
        total = _add_logs(xp, carry[0], total)
    return total - log(sum(weights[: k + 1])), (total,)


def _geometric(combination: Combination, xp: Any, k: int, z: Any, carry: Any) -> tuple[Any, Any]:
    # carry: the log-probabilities of all exits so far, as each exit weighs them anew.
    parts = (*(carry or ()), _log_softmax(xp, z))
    total, excluded = xp.zeros_like(z), xp.zeros_like(z) > 0
    for weight, part in zip(combination.weights[k], parts, strict=True):
        outside = part == -xp.inf
        # A class that an exit excludes is excluded for any weight, 0 included.
        excluded = excluded | outside
        total = total + weight / (k + 1) * xp.where(outside, xp.zeros_like(z), part)
    if combination.biases:
        total = total + _like(xp, combination.biases[k], z)
    return _log_softmax(xp, xp.where(excluded, xp.full_like(z, -xp.inf), total)), parts


def _additive(combination: Combination, xp: Any, k: int, z: Any, carry: Any) -> tuple[Any, Any]:
    # carry: the probabilities of all exits so far. The biases are positive, so that no sum is 0.
    parts = (*(carry or ()), xp.exp(_log_softmax(xp, z)))
    total = _like(xp, combination.biases[k], z) + xp.zeros_like(z)
    for weight, part in zip(combination.weights[k], parts, strict=True):
        total = total + weight * part
    return xp.log(total / xp.sum(total, axis=1, keepdims=True)), parts


def _like(xp: Any, values: tuple[float, ...], z: Any) -> Any:
    """Return the numbers as an array of z's type, on its device."""
    return np.array(values) if xp is np else z.new_tensor(values)


_ADVANCE: dict[str, Callable[[Combination, Any, int, Any, Any], tuple[Any, Any]]] = {
    "calibrated": _calibrated,
    "product": _product,
    "caching": _caching,
    "geometric": _geometric,
    "additive": _additive,
    "mean": _averaged,
    "mie": _averaged,
}


def _log_probabilities(logits: np.ndarray, labels: Integers, k: int, required: bool = True) -> Floats:
    """Return the log-probabilities of exit k, [N, C]; `required`: that of the label must not be -infinity."""
    z = below_top(logits, k + 1)
    if required and z[np.arange(len(z)), labels].min() == -np.inf:
        raise UserError(f"exit {k + 1} gives a right class probability 0; expected finite logits of all labels")
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return z


def _fit_geometric(logits: np.ndarray, labels: Integers, before: Combination | None) -> tuple[Rows, Rows]:
    # Imported when used: evaluation without a fit need not load scipy.
    from scipy.optimize import minimize

    samples, exits, classes = logits.shape
    parts = np.empty((exits, samples, classes))
    excluded = np.zeros((samples, classes), dtype=bool)
    weights, biases = [], []
    biased = classes <= BIASED_CLASSES
    for k in range(exits):
        parts[k] = _log_probabilities(logits[:, k], labels, k)
        outside = parts[k] == -np.inf
        parts[k][outside] = 0
        excluded |= outside
        start = np.concatenate([np.ones(k + 1), np.zeros(classes if biased else 0)])
        if before is not None:
            start = np.array([*before.weights[k], *(before.biases[k] if biased else ())])
        best = minimize(
            _geometric_loss,
            start,
            args=(parts[: k + 1], labels, excluded),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * (k + 1) + [(None, None)] * (len(start) - k - 1),
            options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-6},
        )
        weights.append(tuple(best.x[: k + 1].tolist()))
        biases.append(tuple(best.x[k + 1 :].tolist()))
    return tuple(weights), tuple(biases) if biased else ()


def _geometric_loss(
    values: Floats, parts: Floats, labels: Integers, excluded: np.ndarray | None = None
) -> tuple[float, Floats]:
    """Return the ridge-penalised NLL of one exit and its gradient.

    Args:
        values: the weights [k + 1], then the biases [C] or none.
        parts: log-probabilities of the exits 0..k, [k + 1, N, C], 0 where a class is excluded.
        labels: [N].
        excluded: classes that an exit excludes, [N, C].
    """
    exits, samples, classes = parts.shape
    weights, bias = values[:exits], values[exits:]
    flat = parts.reshape(exits, -1)
    z = (weights / exits @ flat).reshape(samples, classes)
    if len(bias):
        z += bias
    if excluded is not None and excluded.any():
        z[excluded] = -np.inf
    rows = np.arange(samples)
    z -= z.max(axis=1, keepdims=True)
    of_label = z[rows, labels].copy()
    np.exp(z, out=z)
    total = z.sum(axis=1)
    loss = (np.log(total) - of_label).mean()
    # The gradient of the NLL in the combined logits: q - onehot(label).
    z /= total[:, None]
    z[rows, labels] -= 1
    gradient = np.concatenate([flat @ z.ravel() / exits, z.sum(axis=0) if len(bias) else bias]) / samples
    centred = values - np.concatenate([np.ones(exits), np.zeros(len(bias))])
    return float(loss + RIDGE * centred @ centred), gradient + 2 * RIDGE * centred


def _fit_additive(logits: np.ndarray, labels: Integers, before: Combination | None) -> tuple[Rows, Rows]:
    samples, exits, classes = logits.shape
    of_label = np.empty((samples, exits))
    weights, biases = [], []
    for k in range(exits):
        logp = _log_probabilities(logits[:, k], labels, k, required=False)
        of_label[:, k] = np.exp(logp[np.arange(samples), labels])
        start = None if before is None else np.array([*before.weights[k], *before.biases[k]])
        shares = _mixture(of_label[:, : k + 1], labels, classes, start)
        weights.append(tuple(shares[: k + 1].tolist()))
        biases.append(tuple(shares[k + 1 :].tolist()))
    return tuple(weights), tuple(biases)


def _mixture(of_label: Floats, labels: Integers, classes: int, start: Floats | None = None) -> Floats:
    """Return the weights [M + C], of sum 1, of the best mixture of M exits and C classes.

    They minimise F(u) = -mean_i log(sum_m u_m p_m(y_i) + u_{y_i}) + sum(u) - sum(a log u) over u > 0, where a is 1 / N
    for each exit and 1 / (N C) for each class. F is convex. As its first term falls by log s when u is multiplied by s,
    the sum of u is 1 + sum(a) at the minimum: F restricted to that sum is the NLL of the normalised mixture, plus the
    barrier.

    Args:
        of_label: probability of the right class at each exit, p_m(y_i), [N, M].
        labels: [N].
        classes: C.
        start: weights to start from, positive.
    """
    samples, exits = of_label.shape
    barrier = np.concatenate([np.full(exits, 1.0), np.full(classes, 1 / classes)]) / samples
    equal = np.concatenate([np.full(exits, 0.9 / exits), np.full(classes, 0.1 / classes)])
    u = equal if start is None else start

    def loss(values: Floats) -> float:
        mixed = of_label @ values[:exits] + values[exits:][labels]
        return float(values.sum() - np.log(mixed).mean() - barrier @ np.log(values))

    current = loss(u)
    for _ in range(_STEPS):
        inverse = 1 / (of_label @ u[:exits] + u[exits:][labels])
        scaled = of_label * inverse[:, None]
        gradient = 1 - barrier / u
        gradient[:exits] -= scaled.mean(axis=0)
        gradient[exits:] -= np.bincount(labels, inverse, classes) / samples
        hessian = np.diag(barrier / u**2)
        hessian[:exits, :exits] += scaled.T @ scaled / samples
        for m in range(exits):
            crossed = np.bincount(labels, scaled[:, m] * inverse, classes) / samples
            hessian[m, exits:] += crossed
            hessian[exits:, m] += crossed
        diagonal = np.arange(exits, exits + classes)
        hessian[diagonal, diagonal] += np.bincount(labels, inverse**2, classes) / samples
        # Relative to u the Hessian is well conditioned: weights differ by orders of magnitude.
        relative = -np.linalg.solve(u[:, None] * hessian * u, u * gradient)
        decrement = -float(relative @ (u * gradient))
        if decrement < 1e-10:  # convergence is quadratic: the last step is exact to rounding
            u = u * (1 + relative)
            break
        size = min(1.0, 0.99 / max(-relative.min(), 1e-300))
        while (tried := loss(u * (1 + size * relative))) > current - 0.1 * size * decrement and size > 1e-10:
            size /= 2
        u, current = u * (1 + size * relative), tried
    normalised: Floats = u / u.sum()
    return normalised


def _fit_mie(logits: np.ndarray, labels: Integers, costs: Floats) -> tuple[float, ...]:
    samples, exits, _ = logits.shape
    rows = np.arange(samples)
    before = np.full(samples, -np.inf)
    temperatures = []
    for k in range(exits):
        z = below_top(logits[:, k], k + 1)
        of_label = z[rows, labels].copy()
        if k == 0 and of_label.min() == -np.inf:
            raise UserError("exit 1 gives a right class probability 0; expected finite logits of all labels")
        temperature, before = _mie_temperature(z, of_label, log(costs[k]), before)
        temperatures.append(temperature)
    return tuple(temperatures)


def _mie_temperature(z: Floats, of_label: Floats, log_cost: float, before: Floats) -> tuple[float, Floats]:
    """Return the temperature of one exit that minimises the NLL of the sum, and the sum with it.

    Args:
        z: logits of the exit minus each sample's largest, [N, C].
        of_label: those of the labels, [N].
        log_cost: logarithm of the weight of the exit.
        before: logarithm of the weighted sum of the probabilities of the right class, up to the exit before, [N].
    """
    # Imported when used: evaluation without a fit need not load scipy.
    from scipy.optimize import minimize_scalar

    scratch = np.empty_like(z)

    def total(log_t: float) -> Floats:
        inverse = exp(-log_t)
        with np.errstate(over="ignore"):
            np.multiply(z, inverse, out=scratch)
        np.exp(scratch, out=scratch)
        result: Floats = np.logaddexp(before, of_label * inverse - np.log(scratch.sum(axis=1)) + log_cost)
        return result

    def loss(log_t: float) -> float:
        return -float(total(log_t).mean())

    # The NLL of a sum may have several minima in T; the grid finds the neighbourhood of the lowest.
    grid = np.linspace(log(LOWEST), log(HIGHEST), _GRID)
    values = [loss(log_t) for log_t in grid]
    best = int(np.argmin(values))
    around = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-6})
    chosen = float(found.x) if found.fun <= values[best] else float(grid[best])
    return exp(chosen), total(chosen)
