"""Be Your Own Teacher: shallow exits learn from the label, from the last exit's output, and from its feature.

Paper: Zhang et al., Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
Distillation, ICCV 2019,
https://openaccess.thecvf.com/content_ICCV_2019/html/Zhang_Be_Your_Own_Teacher_Improve_the_Performance_of_Convolutional_Neural_ICCV_2019_paper.html

With exits k = 0..K-1, logits z_k [B, C], labels y and the features f_k [B, d_k] that the classifiers read (the
flattened embeddings):

    L_k = (1 - a) CE(z_k, y) + a D_k + l h_k     for k < K-1
    L_{K-1} = CE(z_{K-1}, y)

    D_k = KL(softmax(z_{K-1} / T) || softmax(z_k / T))     without a factor T^2
    h_k = |A_k f_k - f_{K-1}|^2                            the hint: the squared distance of each image's features

A_k [d_{K-1}, d_k] is a trained linear map; if the widths are equal, A_k is the identity. The gradients of the logits
and the feature of the last exit are stopped in the other exits' losses.

What differs from the published code (https://github.com/ArchipLab-LinfengZhang/pytorch-self-distillation-final), which
`variant = "released"` follows: D_k is the cross-entropy of the two outputs at temperature T, whose gradient is the same
(`divergence`); h_k is the norm of all differences of the batch, neither squared nor averaged, so that an image's hint
has about 1/B of its weight in the paper's form (`hint`); and the exit before the last one has no hint (`skip_deepest`).
On several ranks the norm is that of the global batch. The published network has attention and convolutions in its
exits; here the exits are the network's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from exitkit.methods.distillation import (
    adapted_feature,
    distillation_losses,
    make_hint_adapters,
    soft_cross_entropies,
)
from exitkit.networks import Outputs
from exitkit.strategy import (
    OBJECTIVE,
    Batch,
    LocalBatch,
    Run,
    TrainingStrategy,
    UserError,
    Variant,
    resolve_variant,
    setting,
)


@dataclass(eq=False)
class BeYourOwnTeacher(TrainingStrategy):
    """Be Your Own Teacher: the last exit teaches the others by its output and its feature.

    Zhang et al., ICCV 2019,
    https://openaccess.thecvf.com/content_ICCV_2019/html/Zhang_Be_Your_Own_Teacher_Improve_the_Performance_of_Convolutional_Neural_ICCV_2019_paper.html

    L_k [B] = (1 - a) CE(z_k, y) + a KL(softmax(z_{K-1} / T) || softmax(z_k / T)) + l |A_k f_k - f_{K-1}|^2, k < K-1,
    for logits z_k [B, C] and features f_k [B, d_k].

    Example:
        >>> exitkit.build_strategy("byot", variant="released").hint
        'norm'
    """

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})
    paper: ClassVar[str] = (
        "Zhang et al., Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self "
        "Distillation, ICCV 2019"
    )

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    alpha: float = setting(
        0.3, "a, weight of the distillation loss; that of the label loss is 1 - a", search=(0.1, 0.9)
    )
    hint_weight: float = setting(0.03, "l, weight of the distance to the last exit's feature; 0: no hints")
    temperature: float = setting(3.0, "T, temperature of both softmaxes", search=(1.0, 5.0))
    divergence: Literal["divergence", "cross-entropy"] | None = setting(
        None,
        "form of D: both have the same gradient, and differ by the teacher's entropy",
        variant={"paper": "divergence", "released": "cross-entropy"},
    )
    hint: Literal["squared", "norm"] | None = setting(
        None,
        "squared distance of each image's features, or one norm over the batch",
        variant={"paper": "squared", "released": "norm"},
    )
    skip_deepest: bool | None = setting(
        None, "leave out the hint of the exit before the last one", variant={"paper": False, "released": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha}; expected a share between 0 and 1")
        if not (self.hint_weight >= 0 and math.isfinite(self.hint_weight)):
            raise UserError(f"hint_weight is {self.hint_weight}; expected at least 0")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; expected above 0")

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return the settings without effect; without hints those of the hints have none."""
        hints = {} if self.hint_weight else dict.fromkeys(("hint", "skip_deepest"), "hint_weight above 0")
        return super().unused_settings(yielded) | hints

    def prepare(self, run: Run) -> None:
        """Make the maps A_k of the exits that have a hint."""
        make_hint_adapters(run, self._hinted(run))

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return L_k [B] of every exit."""
        *early, last = super().exit_losses(run, outputs, batch)
        distillation = soft_cross_entropies if self.divergence == "cross-entropy" else self._divergences
        losses = [
            (1 - self.alpha) * label_loss + self.alpha * distillation(logits, outputs.logits[-1], self.temperature)
            for label_loss, logits in zip(early, outputs.logits[:-1], strict=True)
        ]
        for index in self._hinted(run):
            losses[index] = losses[index] + self.hint_weight * self._hints(run, outputs, index, batch)
        return [*losses, last]

    def _hinted(self, run: Run) -> range:
        """Return the exits that have a hint."""
        return range(run.network.num_exits - (2 if self.skip_deepest else 1) if self.hint_weight else 0)

    @staticmethod
    def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return distillation_losses(student, teacher, temperature) / temperature**2

    def _hints(self, run: Run, outputs: Outputs, index: int, batch: Batch) -> Tensor:
        """Return h_k [B]; for the norm, N s_i / |s| with the squared distances s_i of N images, whose mean is |s|."""
        target = adapted_feature(run, outputs, run.network.num_exits - 1).detach()
        squares = (adapted_feature(run, outputs, index) - target).square().sum(1)
        if self.hint == "squared":
            return squares
        # n = sqrt(sum_i s_i) over the global batch has the gradient sum_i ds_i / (2 n), and 0 where n is 0.
        total = LocalBatch.of(batch).total
        norm = (total * run.mean(squares.mean(), batch)).sqrt()
        factor = torch.where(norm > 0, total / norm, torch.zeros_like(norm))
        return factor * (squares + squares.detach()) / 2
