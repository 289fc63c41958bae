"""Distillation: every exit learns from the label and from later exits of the network, or another run's last exit.

Paper: Phuong and Lampert, Distillation-Based Training for Multi-Exit Architectures, ICCV 2019,
https://openaccess.thecvf.com/content_ICCV_2019/html/Phuong_Distillation-Based_Training_for_Multi-Exit_Architectures_ICCV_2019_paper.html
It is "KD" in table 5 of Meta-GF (Sun et al., ECCV 2022), with few labels (150 images per class).

With exits k = 0..K-1, logits z_k [B, C], labels y, softmax s and the exits J_k that teach exit k,

    L_k = (1 - w) CE(z_k, y) + w mean_{j in J_k} T^2 KL(s(z_j / T) || s(z_k / T))     where J_k is not empty
    L_k = CE(z_k, y)                                                                 elsewhere

and the gradients of a teacher's logits are stopped in the losses of other exits. J_k is the last exit (Phuong and
Lampert), the next exit, or all later exits (`teachers`). With `teacher`, the last exit of another run replaces
them and teaches all K exits. Phuong and Lampert give neither the weight w nor the temperature T of Meta-GF's table, and
their code is not published, so that nothing is known to differ. The defaults are w = 0.5 and T = 2.

`form = "cross-entropy"` is the objective of another paper's released code: Kubaty et al., How to Train Your Multi-Exit
Model?, ICML 2025, https://arxiv.org/abs/2407.14320, code https://github.com/kamadforge/early-exit-benchmark. With the
cross-entropy H(p, q) = -sum_c p_c log q_c and P = sum_k |J_k| pairs of a teacher and a pupil (K - 1 for the last or the
next exit, K (K - 1) / 2 for all later ones), it adds to the whole label loss

    L_k = CE(z_k, y) + w K / P sum_{j in J_k} T^2 H(s(z_j / T), s(z_k / T)) .

What differs from that code: it takes the mean over the exits and T = 1. `temperature=1` and, with joint, exit weights
of 1 / K make the two equal: (1/K) sum_k CE_k + (w/P) sum_k sum_j H(s(z_j), s(z_k)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from exitkit.methods.distillation import distillation_losses, soft_cross_entropies
from exitkit.networks import Outputs
from exitkit.strategy import OBJECTIVE, Batch, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class SelfDistillation(TrainingStrategy):
    """Distillation: every exit learns from the label and from the last exit, later exits, or another run.

    Phuong and Lampert, ICCV 2019,
    https://openaccess.thecvf.com/content_ICCV_2019/html/Phuong_Distillation-Based_Training_for_Multi-Exit_Architectures_ICCV_2019_paper.html

    L_k [B] = (1 - w) CE(z_k, y) + w mean_j T^2 KL(softmax(z_j / T) || softmax(z_k / T)) for logits z_k [B, C], where
    exit j is the last exit, the next exit, or each later exit in turn.

    Example:
        >>> exitkit.build_strategy("kd", teacher="joint").teacher_runs()
        ('joint',)
    """

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})
    paper: ClassVar[str] = "Phuong and Lampert, Distillation-Based Training for Multi-Exit Architectures, ICCV 2019"

    weight: float = setting(
        0.5, "w, weight of the teachers; in the divergence form, the weight of the label is 1 - w", search=(0.1, 0.9)
    )
    temperature: float = setting(2.0, "T, temperature of both softmaxes", search=(1.0, 5.0))
    teacher: str | None = setting(
        None,
        "another run as teacher: its folder, or a method (trained first, with the same recipe); none: later exits",
    )
    teachers: Literal["last", "next", "later"] = setting(
        "last", "teachers of an early exit: the last exit, the next exit, or all later exits", added=True
    )
    form: Literal["divergence", "cross-entropy"] = setting(
        "divergence", "(1 - w) label loss + w divergence, or label loss + w cross-entropy", added=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "divergence" and not 0 <= self.weight <= 1:
            raise UserError(f"weight is {self.weight}; expected a share between 0 and 1")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise UserError(f"weight is {self.weight}; expected at least 0")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; expected above 0")
        if self.teacher is not None and self.teachers != "last":
            raise UserError(
                f"teachers={self.teachers} selects exits of the network, and teacher={self.teacher} "
                "replaces them; set one of them"
            )

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return L_k [B] of every exit."""
        plain = super().exit_losses(run, outputs, batch)
        logits = outputs.logits
        if self.teacher is None:
            teachers = [self._teachers_of(index, logits) for index in range(len(logits))]
        else:
            teachers = [[run.teacher(self.teacher, batch[0]).logits[-1]]] * len(logits)
        scale = len(logits) / max(sum(map(len, teachers)), 1)
        return [
            self._mixed(label_loss, pupil, exit_teachers, scale) if exit_teachers else label_loss
            for label_loss, pupil, exit_teachers in zip(plain, logits, teachers, strict=True)
        ]

    def _teachers_of(self, index: int, logits: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the logits [B, C] of the exits that teach exit `index`: none for the last."""
        later = logits[index + 1 :]
        return {"last": later[-1:], "next": later[:1], "later": later}[self.teachers]

    def _mixed(self, label_loss: Tensor, pupil: Tensor, teachers: Sequence[Tensor], scale: float) -> Tensor:
        """Return L_k [B] of an exit that has teachers; `scale` is K / P."""
        if self.form == "divergence":
            losses = [distillation_losses(pupil, teacher, self.temperature) for teacher in teachers]
            return (1 - self.weight) * label_loss + self.weight * (sum(losses[1:], losses[0]) / len(losses))
        losses = [soft_cross_entropies(pupil, teacher, self.temperature) for teacher in teachers]
        return label_loss + self.weight * scale * self.temperature**2 * sum(losses[1:], losses[0])

    def teacher_runs(self) -> tuple[str, ...]:
        """Return the other run, if there is one."""
        return () if self.teacher is None else (self.teacher,)
