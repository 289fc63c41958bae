"""Distillation: the exits learn what the network's own last exit, or another run's, says of an image beside the label.

Paper: Phuong and Lampert, Distillation-Based Training for Multi-Exit Architectures, ICCV 2019; it is "KD" in table 5 of
Meta-GF (Sun et al., ECCV 2022), with few labels (150 images a class). With exits k = 0..K-1, logits z_k and labels y

    L_k = (1 - w) CE(z_k, y) + w T^2 KL(softmax(z_{K-1} / T) || softmax(z_k / T))     for k < K-1
    L_{K-1} = CE(z_{K-1}, y)

and the last exit's logits are held fixed in the others' losses. With `teacher`, another run's last exit stands in its
place and teaches all K exits. Neither the weight w nor the temperature T behind that
table is in the paper, nor is its code published: nothing differs that could be known. The defaults here are even parts
and a mild softening.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from exitkit.distillation import distillation_losses
from exitkit.errors import UserError
from exitkit.plugins import setting
from exitkit.strategy import OBJECTIVE, TrainingStrategy

if TYPE_CHECKING:
    from exitkit.data.base import Batch
    from exitkit.network import Outputs
    from exitkit.run import Run


@dataclass(eq=False)
class SelfDistillation(TrainingStrategy):
    """Distillation: every exit learns from the label and from the last exit, or from another run."""

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
        mixed = [(1 - self.weight) * own + self.weight * given for own, given in zip(plain, taught, strict=False)]
        return mixed + plain[len(mixed) :]

    def teachers(self) -> tuple[str, ...]:
        """Return the other run, if there is one."""
        return () if self.teacher is None else (self.teacher,)
