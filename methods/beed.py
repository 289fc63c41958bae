"""Exit-ensemble distillation: the weighted ensemble of all exits teaches every exit, including the last.

Paper: Lee and Lee, Students are the Best Teacher: Exit-Ensemble Distillation with Multi-Exits, arXiv 2021 (EED), and
its successor at ACCV 2022 (BEED), https://arxiv.org/abs/2104.00299, code https://github.com/hjdw2/BEED

With exits k = 0..K-1, logits z_k [B, C], labels y and features f_k, the teacher is

    z_E = sum_k b^k z_k / sum_k b^k,     f_E = sum_k b^k f_k / sum_k b^k     (gradients stopped)

and exit k learns from the label, from the teacher's output and from its feature:

    KD_k = T^2 KL(softmax(z_E / T) || softmax(z_k / T))        FD_k = mean over elements of (f_k - f_E)^2
    L_k = CE(z_k, y) + KD_k + h FD_k                           `mode = "eed"`
    L_k = (2 - a_k) CE(z_k, y) + a_k KD_k + h FD_k             `mode = "beed"`,  a_k = a^(3 (K-1-k) / (K-1))

so that early exits learn more from the teacher and late ones more from the label.

What differs from the published code: its exponent is K-1-k, for which 2 - a_k is negative in a network of seven exits
(2 - 1.15^6 = -0.31); the exponent here is equal for four exits, and never gives a negative coefficient. Its f_k is the
map before pooling; here it is the vector that the classifier reads, unless `hints = "maps"`, because the maps of exits
in other networks have different shapes. If the widths of these vectors differ, a trained linear map A_k [d_{K-1}, d_k]
changes them to the last exit's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from exitkit.methods.distillation import adapted_feature, distillation_losses, make_hint_adapters
from exitkit.networks import MultiExitNetwork, Outputs
from exitkit.strategy import OBJECTIVE, Batch, Run, TrainingStrategy, UserError, at_least_float32, setting


@dataclass(eq=False)
class ExitEnsembleDistillation(TrainingStrategy):
    """EED and BEED: the ensemble of all exits teaches every exit by its output and its feature.

    Lee and Lee, arXiv 2021 and ACCV 2022, https://arxiv.org/abs/2104.00299

    L_k [B] = (2 - a_k) CE(z_k, y) + a_k T^2 KL(softmax(z_E / T) || softmax(z_k / T)) + h mean (f_k - f_E)^2, with
    z_E [B, C] = sum_k b^k z_k / sum_k b^k, f_E likewise, and a_k = a^(3 (K-1-k) / (K-1)).

    Example:
        >>> [round(a, 3) for a in exitkit.build_strategy("beed").coefficients(4)]
        [1.521, 1.322, 1.15, 1.0]
    """

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})
    paper: ClassVar[str] = "Lee and Lee, Students are the Best Teacher: Exit-Ensemble Distillation, arXiv 2021"

    mode: Literal["beed", "eed"] = setting("beed", "coefficients a_k that decrease from exit to exit, or all 1")
    alpha: float = setting(1.15, "a, the base of the coefficients", search=(1.0, 1.25), needs={"mode": ("beed",)})
    beta: float = setting(1.6, "b, ratio of the weights of neighbouring exits in the ensemble; 1: equal weights")
    temperature: float = setting(3.0, "T, temperature of both softmaxes", search=(1.0, 5.0))
    hint_weight: float = setting(0.1, "h, weight of the distance to the ensemble's feature; 0: no hints")
    hints: Literal["pooled", "maps"] = setting(
        "pooled", "features that the classifiers read, or maps before pooling (which must have the same shape)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha**3 <= 2:
            raise UserError(
                f"alpha is {self.alpha}; expected above 0 and at most 1.25 (2 - alpha^3 must not be negative)"
            )
        for name in ("beta", "temperature"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} is {getattr(self, name)}; expected above 0")
        if not (self.hint_weight >= 0 and math.isfinite(self.hint_weight)):
            raise UserError(f"hint_weight is {self.hint_weight}; expected at least 0")

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return the settings without effect; without hints the kind of features has none."""
        return super().unused_settings(yielded) | ({} if self.hint_weight else {"hints": "hint_weight above 0"})

    def coefficients(self, exits: int) -> list[float]:
        """Return a_k of every exit."""
        if self.mode == "eed":
            return [1.0] * exits
        return [self.alpha ** (3 * (exits - 1 - index) / max(exits - 1, 1)) for index in range(exits)]

    def adapt(self, network: MultiExitNetwork) -> None:
        """Keep the maps before pooling, if they are the hints."""
        if self.hints == "maps" and self.hint_weight:
            network.keep_features = True

    def prepare(self, run: Run) -> None:
        """Make the maps A_k."""
        if self.hints == "pooled" and self.hint_weight:
            make_hint_adapters(run, range(run.network.num_exits))

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return L_k [B] of every exit."""
        labels = super().exit_losses(run, outputs, batch)
        teacher = self._ensemble(list(outputs.logits))
        teacher_losses = [distillation_losses(logits, teacher, self.temperature) for logits in outputs.logits]
        coefficients = self.coefficients(len(labels))
        kept = [1.0 if self.mode == "eed" else 2 - share for share in coefficients]
        losses = [
            keep * label_loss + share * teacher_loss
            for keep, label_loss, share, teacher_loss in zip(kept, labels, coefficients, teacher_losses, strict=True)
        ]
        if not self.hint_weight:
            return losses
        features = self._features(run, outputs)
        target = self._ensemble(features)
        hints = [(feature - target).square().flatten(1).mean(1) for feature in features]
        return [loss + self.hint_weight * hint for loss, hint in zip(losses, hints, strict=True)]

    def _ensemble(self, values: list[Tensor]) -> Tensor:
        """Return sum_k b^k v_k / sum_k b^k, without gradients."""
        start = 1 - len(values) if self.beta > 1 else 0  # so that no power overflows
        powers = [self.beta ** (start + index) for index in range(len(values))]
        terms = [
            power / sum(powers) * at_least_float32(value.detach()) for power, value in zip(powers, values, strict=True)
        ]
        return sum(terms[1:], terms[0])

    def _features(self, run: Run, outputs: Outputs) -> list[Tensor]:
        """Return f_k of every exit: vectors [B, d], or maps [B, c, h, w].

        Raises:
            UserError: the maps have different shapes.
        """
        if self.hints == "pooled":
            return [adapted_feature(run, outputs, index) for index in range(len(outputs.embeddings))]
        maps = [at_least_float32(feature) for feature in outputs.features if feature is not None]
        shapes = list(dict.fromkeys("x".join(map(str, feature.shape[1:])) for feature in maps))
        if len(shapes) > 1:
            raise UserError(
                f"hints=maps needs maps of the same shape, and the exits have {', '.join(shapes)}; use hints=pooled"
            )
        return maps
