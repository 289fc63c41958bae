"""The distillation loss: one classifier learns the class probabilities of another."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax

from exitkit.strategy import at_least_float32


def distillation_losses(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)) of each image, [B], for logits [B, C].

    The factor keeps the gradient's size independent of T (Hinton et al., Distilling the Knowledge in a Neural Network,
    2015, section 2). No gradient reaches the teacher.
    """
    wanted = log_softmax(at_least_float32(teacher.detach()) / temperature, 1)
    given = log_softmax(at_least_float32(student) / temperature, 1)
    # torch's kl_div would be the same, but that `vmap` runs it replica by replica.
    return temperature**2 * (wanted.exp() * (wanted - given)).sum(1)
