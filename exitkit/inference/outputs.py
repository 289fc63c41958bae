"""Outputs of exits, and what rules read of them; each is computed once, for all policies that read it.

Shapes: N samples, K exits, C classes. Exits from 0. No row depends on another, so that a sample has the same scores
alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exitkit.errors import UserError
from exitkit.inference.scores import below_top, entropy, exit_scores, probabilities, scores
from exitkit.inference.thresholds import Floats, Integers


class ExitView:
    """The outputs of one exit.

    Args:
        logits: [N, C]; -infinity excludes a class.
        index: the exit.
    """

    def __init__(self, logits: np.ndarray, index: int) -> None:
        self.logits, self.index = logits, index
        self._known: dict[str, np.ndarray] = {}

    def score(self, name: str) -> Floats:
        """Return confidence, margin or entropy of `scores.SCORES`, [N].

        Raises:
            UserError: a logit is NaN or +infinity.
        """
        values: Floats = self._once(name, lambda: exit_scores(self.logits, name, exit=self.index + 1)[0])
        return values

    @property
    def predicted(self) -> Integers:
        """The class with the largest output, [N]."""
        classes: Integers = self._once("predicted", lambda: self.logits.argmax(axis=1))
        return classes

    @property
    def entropies(self) -> Floats:
        """The entropies, in nats, of p and of p^2 / sum p^2, [N, 2]."""
        values: Floats = self._once("entropies", self._entropies)
        return values

    def probability(self) -> Floats:
        """Return p, [N, C]; it is not kept, since it is as large as the outputs of the exit."""
        return probabilities(self.logits, self.index + 1)

    def rows(self, logits: np.ndarray, rows: Integers) -> ExitView:
        """Return the view of some rows, whose logits are given, with all that is known of them."""
        view = ExitView(logits, self.index)
        view._known = {name: values[rows] for name, values in self._known.items()}
        return view

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def _entropies(self) -> Floats:
        z = below_top(self.logits, self.index + 1)
        with np.errstate(over="ignore"):  # a difference beyond the float64 range becomes -infinity, of probability 0
            return np.stack([entropy(z), entropy(2 * z)], axis=1)


class Embeddings(NamedTuple):
    """What the last layers of the exits read, for combinations that need more than outputs.

    Attributes:
        parts: the embeddings of N samples at each exit, K arrays [N, d_k].
        curvature: of the last layers on the training images; see `exitkit.runs.embeddings`.
    """

    parts: tuple[np.ndarray, ...]
    curvature: Mapping[str, np.ndarray]

    def rows(self, rows: Integers) -> Embeddings:
        """Return the embeddings of some samples."""
        return self._replace(parts=tuple(part[rows] for part in self.parts))


class ExitOutputs:
    """The outputs of all exits.

    Args:
        logits: [N, K, C]; -infinity excludes a class.
        embeddings: of the same samples and exits; None: not known.

    Attributes:
        logits: [N, K, C].
        embeddings: see above.
        exits: K views.

    Raises:
        UserError: the logits have another shape, or the embeddings are of other samples or exits.
    """

    def __init__(self, logits: ArrayLike, embeddings: Embeddings | None = None) -> None:
        self.logits, self.embeddings = np.asarray(logits), embeddings
        if self.logits.ndim != 3:
            raise UserError(f"logits have the shape {list(self.logits.shape)}; expected [N, K, C]")
        shapes = [] if embeddings is None else [part.shape[:1] for part in embeddings.parts]
        if embeddings is not None and shapes != [self.logits.shape[:1]] * self.logits.shape[1]:
            raise UserError(f"embeddings are of {shapes} samples; expected those of logits {list(self.logits.shape)}")
        self.exits = [ExitView(self.logits[:, k], k) for k in range(self.logits.shape[1])]
        self._scores: dict[str, Floats] = {}

    @classmethod
    def of(cls, logits: ArrayLike | ExitOutputs, exits: int) -> ExitOutputs:
        """Return the outputs of K = `exits` exits, given as such or as logits [N, K, C].

        Raises:
            UserError: they have another shape.
        """
        outputs = logits if isinstance(logits, ExitOutputs) else cls(logits)
        if len(outputs.exits) != exits:
            raise UserError(f"logits have the shape {list(outputs.logits.shape)}; expected [N, {exits}, C]")
        return outputs

    def __len__(self) -> int:
        return len(self.logits)

    def scores(self, name: str) -> Floats:
        """Return one of `scores.SCORES`, [N, K].

        Raises:
            UserError: the name is unknown, or a logit is NaN or +infinity.
        """
        if name not in self._scores:
            if name == "patience":  # of several exits together
                self._scores[name] = scores(self.logits, name)
            else:
                self._scores[name] = np.stack([view.score(name) for view in self.exits], axis=1)
        return self._scores[name]

    def correct(self, labels: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each exit is right, [N, K], from labels [N]."""
        hits: NDArray[np.bool_] = np.stack([view.predicted == labels for view in self.exits], axis=1)
        return hits

    def rows(self, rows: Integers) -> ExitOutputs:
        """Return the outputs of some rows, with all that is known of them."""
        part = ExitOutputs(self.logits[rows], None if self.embeddings is None else self.embeddings.rows(rows))
        part.exits = [view.rows(part.logits[:, k], rows) for k, view in enumerate(self.exits)]
        part._scores = {name: values[rows] for name, values in self._scores.items()}
        return part
