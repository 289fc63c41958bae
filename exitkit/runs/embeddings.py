"""What last-layer Laplace needs of a trained network besides its outputs: embeddings, and the curvature on training.

`exitkit evaluate RUN --embeddings` stores the embedding e_k of each exit, what its last linear layer reads, for the
validation and test images; and, of the training images read as in evaluation, with phi = [e_k, 1] and p = softmax(z_k),
the two expectations whose Kronecker product approximates the Hessian of the loss in the weights of that layer:

    outputs_k  = E[diag(p) - p p^T]   [C, C]
    features_k = E[phi phi^T]         [d_k + 1, d_k + 1]

The Hessian of one image is the Kronecker product exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from exitkit.data.base import Data
from exitkit.engine.engine import Engine
from exitkit.errors import UserError
from exitkit.networks.cascade import Head, LogitLink, MultiExitNetwork, Outputs

_BATCH = 256


def check_linear(network: MultiExitNetwork) -> None:
    """Check that every exit is a linear layer of its embedding alone.

    Raises:
        UserError: an exit is not.
    """
    expected = "last-layer Laplace needs exits that end in a linear layer and read no other exit"
    if type(network.link) is not LogitLink:
        raise UserError(f"the network has the logit link {type(network.link).__name__}; {expected}")
    for number, module in enumerate(network.heads, start=1):
        head = cast(Head, module)
        if not isinstance(head.classify, nn.Linear):
            raise UserError(f"exit {number} ends in {type(head.classify).__name__}; {expected}")
        if head.temperature is not None:
            raise UserError(f"the logits of exit {number} are divided by a temperature; {expected}")


def names_of(exits: int) -> list[str]:
    """Return the names of the embeddings in files and outputs, in the order of the exits."""
    return [f"embedding_{number}" for number in range(1, exits + 1)]


def embeddings_of(outputs: Outputs) -> dict[str, Tensor]:
    """Return the embeddings of a batch by name, [B, d_k] each, on the CPU."""
    return dict(zip(names_of(len(outputs.embeddings)), (part.cpu() for part in outputs.embeddings), strict=True))


class Moments:
    """Sums over images, exit by exit, from which the curvature follows.

    Args:
        network: its exits are linear, see `check_linear`.
    """

    def __init__(self, network: MultiExitNetwork) -> None:
        check_linear(network)
        layers = [cast(nn.Linear, head.classify) for head in cast("list[Head]", list(network.heads))]
        self.images = 0
        self._outputs = [torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64) for layer in layers]
        widths = [layer.in_features + 1 for layer in layers]
        self._features = [torch.zeros(width, width, dtype=torch.float64) for width in widths]

    def add(self, outputs: Outputs) -> None:
        """Add the outputs of a batch."""
        self.images += len(outputs.logits[0])
        for k, (logits, embedding) in enumerate(zip(outputs.logits, outputs.embeddings, strict=True)):
            p = logits.double().softmax(1)
            phi = torch.cat([embedding.double(), p.new_ones(len(p), 1)], 1)
            self._outputs[k] += (p.sum(0).diag() - p.T @ p).cpu()
            self._features[k] += (phi.T @ phi).cpu()

    def curvature(self) -> dict[str, Tensor]:
        """Return the tensors of `curvature.safetensors`: images [1], and outputs_k and features_k of each exit k."""
        tensors = {"images": torch.tensor([self.images])}
        for name, sums in (("outputs", self._outputs), ("features", self._features)):
            tensors |= {f"{name}_{number}": total / self.images for number, total in enumerate(sums, start=1)}
        return tensors


@torch.inference_mode()
def curvature(
    network: MultiExitNetwork, data: Data, engine: Engine, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Tensor]:
    """Return the curvature of each exit on the training images, see `Moments.curvature`.

    Args:
        network: the trained network, on the device of the engine.
        data: the images.
        engine: this process's engine.
        progress: called with the number of images that are done.

    Raises:
        UserError: an exit is not linear, or an image can't be read.
    """
    network.eval()
    moments = Moments(network)
    positions = torch.arange(len(data.labels("train"))).split(_BATCH)
    for batch in data.batches("train", positions, augment=False, seed=0):
        moments.add(network(engine.placement.images(batch.images)))
        progress(moments.images)
    return moments.curvature()
