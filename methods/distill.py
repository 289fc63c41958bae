"""Distillation: every exit learns from the label and from the network's own last exit, or another run's.

Paper: Phuong and Lampert, Distillation-Based Training for Multi-Exit Architectures, ICCV 2019,
https://openaccess.thecvf.com/content_ICCV_2019/html/Phuong_Distillation-Based_Training_for_Multi-Exit_Architectures_ICCV_2019_paper.html
It is "KD" in table 5 of Meta-GF (Sun et al., ECCV 2022), with few labels (150 images per class).

With exits k = 0..K-1, logits z_k and labels y

    L_k = (1 - w) CE(z_k, y) + w T^2 KL(softmax(z_{K-1} / T) || softmax(z_k / T))     for k < K-1
    L_{K-1} = CE(z_{K-1}, y)

and the last exit's logits are held fixed in the others' losses. With `teacher`, the last exit of another run takes its
place and teaches all K exits. The paper states neither the weight w nor the temperature T behind that table, and its
code is not published, so that nothing is known to differ. The defaults here are equal parts and a mild softening.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from exitkit.methods.distillation import distillation_losses
from exitkit.networks import Outputs
from exitkit.strategy import OBJECTIVE, Batch, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class SelfDistillation(TrainingStrategy):
    """Distillation: every exit learns from the label and from the last exit, or from another run.

    Phuong and Lampert, ICCV 2019,
    https://openaccess.thecvf.com/content_ICCV_2019/html/Phuong_Distillation-Based_Training_for_Multi-Exit_Architectures_ICCV_2019_paper.html

    L_k [B] = (1 - w) CE(z_k, y) + w T^2 KL(softmax(z_{K-1} / T) || softmax(z_k / T)), k < K-1, for logits z_k [B, C].

    Example:
        >>> exitkit.build_strategy("kd", teacher="joint").teachers()
        ('joint',)
    """

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})
    paper: ClassVar[str] = "Phuong and Lampert, Distillation-Based Training for Multi-Exit Architectures, ICCV 2019"

    weight: float = setting(0.5, "share of the last exit in what an early exit learns from; the rest is the label's")
    temperature: float = setting(2.0, "how much both are softened before they are compared")
    teacher: str | None = setting(
        None,
        "another run that teaches: its folder, or a method (trained first, all else the same); none: the last exit",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise UserError(f"weight is {self.weight}; expected a share between 0 and 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; expected above 0")

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return L_k [B] of every exit."""
        plain = super().exit_losses(run, outputs, batch)
        if self.teacher is None:
            teacher, pupils = outputs.logits[-1], outputs.logits[:-1]
        else:
            teacher, pupils = run.teacher(self.teacher, batch[0]).logits[-1], outputs.logits
        taught = [distillation_losses(logits, teacher, self.temperature) for logits in pupils]
        mixed = [
            (1 - self.weight) * label_loss + self.weight * teacher_loss
            for label_loss, teacher_loss in zip(plain, taught, strict=False)
        ]
        return mixed + plain[len(mixed) :]

    def teachers(self) -> tuple[str, ...]:
        """Return the other run, if there is one."""
        return () if self.teacher is None else (self.teacher,)
