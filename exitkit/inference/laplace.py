"""Last-layer Laplace: exits that are less confident where their last layer is uncertain (Meronen et al., WACV 2024).

Exit k ends in a linear layer, z_k = W phi with phi = [e_k, 1]. Around its trained weights the posterior is a Gaussian
(https://arxiv.org/abs/2302.06359), whose covariance is the Kronecker product of the inverses of

    U = sqrt(n) E[diag(p) - p p^T] + I / sqrt(v)        [C, C]
    V = sqrt(n) E[phi phi^T] + I / sqrt(v)              [d_k + 1, d_k + 1]

for n training images, p = softmax(z_k), and weights of prior variance v. The logits of a sample then have the mean z_k
and the covariance phi^T V^-1 phi U^-1, and the probabilities are the mean of `DRAWS` softmaxes:

    q_k = mean_s softmax((z_k + sqrt(phi^T V^-1 phi) L eps_s) / T_k)        L L^T = U^-1, eps_s ~ N(0, I)

The same draws eps serve for all samples, so that the output of a sample is a function of it alone. `laplace` is q_k;
`mie-laplace` is the paper's whole method, sum_{j <= k} C_j q_j / sum_{j <= k} C_j with the cumulative costs C.

v and T_k of each exit minimise the NLL of its output on validation, for mie-laplace with those of the earlier exits
fixed. The released code estimates U from one sampled label per batch by a moving average, and searches grids of ten
values of v (0.5 to 4) and of T; here U is the exact expectation, L the symmetric root, and the search continuous
within these values of v and those of `calibration.fit_temperatures`.

Not counted in the costs of exits: (d_k + 1)^2 multiply-adds and `DRAWS` softmaxes per image.

Deployed, the combination becomes the logit link of a copy of the network (`Laplace.linked`), whose outputs are the
log-probabilities; engines and exported programs need not know of it.

Shapes: N samples, K exits, C classes. Exits from 0. Everything is computed in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import exp, log, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from exitkit.errors import UserError, unknown
from exitkit.inference.as_json import decoded, encoded, reading
from exitkit.inference.calibration import HIGHEST, LOWEST, fit_temperatures
from exitkit.inference.combinations import fit_combination
from exitkit.inference.outputs import Embeddings, ExitOutputs
from exitkit.inference.rules.base import Validation
from exitkit.inference.thresholds import Floats
from exitkit.networks.cascade import Carry, LogitLink, MultiExitNetwork
from exitkit.networks.copying import copied
from exitkit.runs.embeddings import check_linear

LAPLACE = ("laplace", "mie-laplace")
"""Names of the combinations of this module."""
DRAWS = 50
LEAST, MOST = 0.5, 4.0
"""Range of the prior variance v."""
_ROWS = 256


@dataclass(frozen=True, eq=False)
class Laplace:
    """A fitted combination of this module; see `fit_laplace`.

    Args:
        name: one of `LAPLACE`.
        noise: the draws L eps_s of each exit, K arrays [S, C].
        roots: of each exit R with R R^T = V^-1, K arrays [d_k + 1, d_k + 1].
        temperatures: T_k, [K].
        variances: v of each exit, [K].
        weights: for mie-laplace the cost of each exit, [K]; else none.

    Raises:
        UserError: the name is unknown, or shapes do not agree.
    """

    name: str
    noise: tuple[Floats, ...]
    roots: tuple[Floats, ...]
    temperatures: tuple[float, ...]
    variances: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in LAPLACE:
            raise unknown("combination", self.name, LAPLACE)
        exits = len(self.noise)
        lengths = {len(self.roots), len(self.temperatures), len(self.variances)}
        if not exits or lengths != {exits} or len(self.weights) != (exits if self.name == "mie-laplace" else 0):
            raise UserError(f"{self.name} has parts for different numbers of exits")
        if any(array.ndim != 2 for array in (*self.noise, *self.roots)) or len({n.shape for n in self.noise}) > 1:
            raise UserError(f"{self.name} has draws or roots of a wrong shape; expected [S, C] and [d + 1, d + 1]")
        if any(root.shape[0] != root.shape[1] for root in self.roots):
            raise UserError(f"{self.name} has a root that is not square; expected [d + 1, d + 1]")
        if not all(value > 0 for value in (*self.temperatures, *self.weights)):
            raise UserError(f"{self.name} has a temperature or a weight that is not positive")

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return len(self.noise)

    @cached_property
    def link(self) -> LaplaceLink:
        """The logit link that computes the combination, on the CPU."""
        return LaplaceLink(self)

    @torch.no_grad()
    def __call__(self, outputs: ExitOutputs) -> Floats:
        """Return the log-probabilities of each exit, [N, K, C], from outputs with embeddings.

        Raises:
            UserError: the embeddings are missing or of other widths, or a logit is not finite.
        """
        embeddings = _embeddings(self.name, outputs).parts
        logits, exits = outputs.logits, range(self.exits)
        if logits.shape[1] != self.exits or logits.shape[2] != self.noise[0].shape[1]:
            raise UserError(f"logits have the shape {list(logits.shape)}; {self.name} is for {self._sizes}")
        if any(embeddings[k].shape[1] + 1 != len(self.roots[k]) for k in exits):
            raise UserError(f"embeddings have {[part.shape[1] for part in embeddings]} values; expected {self._sizes}")
        if not np.isfinite(logits).all():
            raise UserError("an output is not finite; a combination needs finite outputs")
        result = np.empty(logits.shape)
        for start in range(0, len(logits), _ROWS):
            rows, carry = slice(start, start + _ROWS), None
            for k in exits:
                raw, embedding = (torch.from_numpy(np.array(part[rows])) for part in (logits[:, k], embeddings[k]))
                output, carry = self.link(k, raw, embedding, carry)
                result[rows, k] = output.numpy()
        return result

    @property
    def _sizes(self) -> str:
        widths = [len(root) - 1 for root in self.roots]
        return f"{self.exits} exits, {self.noise[0].shape[1]} classes and embeddings of {widths} values"

    def linked(self, network: MultiExitNetwork) -> MultiExitNetwork:
        """Return a copy of a network, in evaluation mode, whose outputs are the log-probabilities, in float64.

        Raises:
            UserError: an exit is not a linear layer of its embedding alone, or the network has other sizes.
        """
        check_linear(network)
        widths = [width + 1 for width in network.embedding_widths()]
        if widths != [len(root) for root in self.roots] or network.num_classes != self.noise[0].shape[1]:
            raise UserError(f"{self.name} is for {self._sizes}; expected a network of these sizes")
        result = copied(network).eval()
        result.set_link(LaplaceLink(self).to(next(network.parameters()).device))
        return result

    def to_json(self) -> str:
        """Return the combination as JSON."""
        return json.dumps({key: encoded(value) for key, value in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Laplace:
        """Return the combination of a text that `to_json` returned; other keys are ignored.

        Raises:
            UserError: the text is not such a combination.
        """
        with reading(text, "a combination"):
            values = json.loads(text)
            return cls(**{key: decoded(values[key]) for key in cls.__dataclass_fields__})


class LaplaceLink(LogitLink):
    """Outputs the log-probabilities of a fitted `Laplace`, in float64; the carry of mie-laplace is its running sum."""

    def __init__(self, fitted: Laplace) -> None:
        super().__init__()
        self.config = (fitted.name, fitted.temperatures, fitted.variances)
        self.temperatures, self.weights = fitted.temperatures, fitted.weights
        for k, (noise, root) in enumerate(zip(fitted.noise, fitted.roots, strict=True)):
            self.register_buffer(f"noise_{k}", torch.from_numpy(np.array(noise, dtype=np.float64)))
            self.register_buffer(f"root_{k}", torch.from_numpy(np.array(root, dtype=np.float64)))

    def forward(self, index: int, raw: Tensor, embedding: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Return the log-probabilities of exit `index` [B, C], and the carry."""
        noise, root = getattr(self, f"noise_{index}"), getattr(self, f"root_{index}")
        e = embedding.double()
        # [e, 1] R, without a copy of e.
        spread = (e @ root[:-1] + root[-1]).square().sum(1).sqrt()
        output = _log_mean_softmax(raw.double(), spread, noise, self.temperatures[index])
        if not self.weights:
            return output, None
        total = output + log(self.weights[index])
        if carry is not None:
            total = torch.logaddexp(carry, total)
        return total - log(sum(self.weights[: index + 1])), total


def _log_mean_softmax(z: Tensor, spread: Tensor, noise: Tensor, temperature: Tensor | float) -> Tensor:
    """Return log mean_s softmax((z + spread noise_s) / T), [N, C], from z [N, C], spread [N] and noise [S, C]."""
    draws = (z[:, None] + spread[:, None, None] * noise) / temperature
    return draws.log_softmax(2).logsumexp(1) - log(len(noise))


def fit_laplace(name: str, validation: Validation, start: Laplace | None = None) -> Laplace:
    """Return one of `LAPLACE`, fitted to validation outputs with embeddings.

    Args:
        name: one of `LAPLACE`.
        validation: the outputs; their embeddings have the curvature on the training images.
        start: a combination of this name, from which the search of v and T starts; None: v = 1 and the temperatures
            of calibrated or mie.

    Raises:
        UserError: the name is unknown, the outputs have no embeddings, or sizes do not agree.
    """
    if name not in LAPLACE:
        raise unknown("combination", name, LAPLACE)
    embeddings = _embeddings(name, validation.outputs)
    logits, labels, costs = validation.logits, torch.from_numpy(validation.labels), validation.costs
    exits, mie = range(logits.shape[1]), name == "mie-laplace"
    if start is not None:
        guesses = list(zip(start.variances, start.temperatures, strict=True))
    elif mie:
        guesses = [(1.0, t) for t in fit_combination("mie", logits, validation.labels, costs).temperatures]
    else:
        guesses = [(1.0, t) for t in fit_temperatures(logits, validation.labels).tolist()]
    fits: list[tuple[Floats, Floats, float, float]] = []
    before: Tensor | None = None
    for k in exits:
        layer = _LastLayer.make(embeddings.curvature, k, embeddings.parts[k], logits.shape[2])
        z = torch.from_numpy(logits[:, k].astype(np.float64))
        objective = _Objective(layer, z, labels, log(costs[k]) if mie else 0.0, before if mie else None)
        best = objective.minimised(*guesses[k])
        before = objective.of_labels(*best)
        fits.append((layer.noise(best[0]).numpy(), layer.root(best[0]), exp(best[1]), exp(best[0])))
    noise, roots = tuple(fit[0] for fit in fits), tuple(fit[1] for fit in fits)
    temperatures, variances = tuple(fit[2] for fit in fits), tuple(fit[3] for fit in fits)
    return Laplace(name, noise, roots, temperatures, variances, tuple(costs.tolist()) if mie else ())


def _embeddings(name: str, outputs: ExitOutputs) -> Embeddings:
    if outputs.embeddings is None:
        raise UserError(
            f"{name} reads the embeddings of a run, which `exitkit evaluate RUN --embeddings` stores; "
            "these are outputs alone"
        )
    return outputs.embeddings


class _LastLayer(NamedTuple):
    """The curvature of an exit's last layer in its eigenvectors, and the embeddings of N samples.

    Functions take the logarithm of the prior variance v, as a number or a tensor.
    """

    u: Tensor
    """sqrt(n) times the eigenvalues of E[diag(p) - p p^T], [C]."""
    u_vectors: Tensor
    v: Tensor
    """sqrt(n) times those of E[phi phi^T], [d + 1]."""
    v_vectors: Tensor
    squares: Tensor
    """[N, d + 1]: squares of phi in these eigenvectors."""

    @classmethod
    def make(cls, curvature: Mapping[str, np.ndarray], k: int, embedding: np.ndarray, classes: int) -> _LastLayer:
        outputs, features = (np.asarray(curvature[f"{kind}_{k + 1}"], np.float64) for kind in ("outputs", "features"))
        width = embedding.shape[1] + 1
        if outputs.shape != (classes, classes) or features.shape != (width, width):
            raise UserError(
                f"the curvature of exit {k + 1} has the shapes {list(outputs.shape)} and {list(features.shape)}; "
                f"expected {[classes, classes]} and {[width, width]}: evaluate the run again with --embeddings"
            )
        scale = sqrt(float(np.asarray(curvature["images"]).item()))
        (u, u_vectors), (v, v_vectors) = (torch.linalg.eigh(torch.from_numpy(part)) for part in (outputs, features))
        phi = torch.from_numpy(np.concatenate([embedding, np.ones((len(embedding), 1))], axis=1, dtype=np.float64))
        # Rounding can make the eigenvalue of the constant vector negative.
        return cls(scale * u.clamp_min(0), u_vectors, scale * v.clamp_min(0), v_vectors, (phi @ v_vectors).square())

    def noise(self, log_v: Tensor | float) -> Tensor:
        """Return the draws L eps_s, [S, C], where L is the symmetric root of U^-1."""
        eps = torch.from_numpy(np.random.default_rng(0).standard_normal((DRAWS, len(self.u))))
        return (eps @ self.u_vectors) * (self.u + _precision(log_v)).rsqrt() @ self.u_vectors.T

    def spread(self, log_v: Tensor | float, rows: slice) -> Tensor:
        """Return sqrt(phi^T V^-1 phi) of some samples, [n]."""
        return (self.squares[rows] @ (self.v + _precision(log_v)).reciprocal()).sqrt()

    def root(self, log_v: float) -> Floats:
        """Return R with R R^T = V^-1, [d + 1, d + 1]."""
        result: Floats = (self.v_vectors * (self.v + _precision(log_v)).rsqrt()).numpy()
        return result


def _precision(log_v: Tensor | float) -> Tensor:
    """Return 1 / sqrt(v)."""
    return torch.exp(-torch.as_tensor(log_v, dtype=torch.float64) / 2)


class _Objective(NamedTuple):
    """The NLL of an exit's output as a function of (log v, log T).

    Attributes:
        layer: the last layer of the exit.
        z: its logits [N, C].
        labels: classes [N].
        log_weight: logarithm of the exit's weight.
        before: logarithm of the weighted sum of the probabilities of the labels at the earlier exits, [N]; None: none.
    """

    layer: _LastLayer
    z: Tensor
    labels: Tensor
    log_weight: float
    before: Tensor | None

    def minimised(self, variance: float, temperature: float) -> tuple[float, float]:
        """Return the (log v, log T) of the smallest NLL, searched from these values of v and T."""
        # Imported when used: evaluation without a fit need not load scipy.
        from scipy.optimize import minimize

        bounds = [(log(LEAST), log(MOST)), (log(LOWEST), log(HIGHEST))]
        options = {"ftol": 1e-10, "gtol": 1e-6, "maxiter": 50}
        first = [log(variance), log(temperature)]
        best = minimize(self.loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return float(best.x[0]), float(best.x[1])

    def loss(self, values: Floats) -> tuple[float, Floats]:
        """Return the NLL at (log v, log T), and its gradient."""
        point = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        total = 0.0
        for rows in self._chunks():
            part = -self._of_rows(rows, point[0], point[1]).sum() / len(self.z)
            part.backward()
            total += float(part.detach())
        assert point.grad is not None
        return total, point.grad.numpy()

    @torch.no_grad()
    def of_labels(self, log_v: float, log_t: float) -> Tensor:
        """Return the logarithm of the labels' (weighted sum of) probabilities, [N]."""
        at = [torch.tensor(value, dtype=torch.float64) for value in (log_v, log_t)]
        return torch.cat([self._of_rows(rows, *at) for rows in self._chunks()])

    def _of_rows(self, rows: slice, log_v: Tensor, log_t: Tensor) -> Tensor:
        spread, noise = self.layer.spread(log_v, rows), self.layer.noise(log_v)
        output = _log_mean_softmax(self.z[rows], spread, noise, log_t.exp())
        of_label = output.gather(1, self.labels[rows, None])[:, 0] + self.log_weight
        return of_label if self.before is None else torch.logaddexp(self.before[rows], of_label)

    def _chunks(self) -> list[slice]:
        return [slice(start, start + _ROWS) for start in range(0, len(self.z), _ROWS)]
