"""A data set of one's own: generated images of horizontal and vertical stripes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from exitkit.data import Data, DataSet, Split, TensorData, hold_out, setting


@dataclass(frozen=True)
class Stripes(DataSet):
    """Grey images of 16x16: horizontal or vertical stripes with noise; 2 classes."""

    house: ClassVar[dict[str, Any]] = DataSet.house | {
        "backbone": "msdnet-tiny",
        "epochs": 3,
        "batch_size": 32,
    }

    validation: int = setting(60, "images held out of the training images, stratified")
    noise: float = setting(0.3, "standard deviation of the noise; brightness is 0..1")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """Generate the images; nothing is read from `data_dir`."""
        draw = torch.Generator().manual_seed(self.split_seed)
        labels = torch.arange(600) % 2
        lines = (torch.arange(16) // 2 % 2).float()
        plain = torch.where(
            labels.view(-1, 1, 1) == 1, lines.view(1, 16, 1), lines.view(1, 1, 16)
        )
        noisy = plain + self.noise * torch.randn(600, 16, 16, generator=draw)
        images = (noisy.clamp(0, 1) * 255).to(torch.uint8).unsqueeze(1)
        rest, test = hold_out(
            labels, torch.arange(600), 200, self.split_seed, "a test set"
        )
        train, validation = hold_out(
            labels, rest, self.validation, self.split_seed, "a validation set"
        )
        return TensorData(
            class_names=["vertical", "horizontal"],
            input_shape=(1, 16, 16),
            train_labels=labels,
            test_labels=labels,
            split=Split(train, validation, test),
            train_images=images,
            test_images=images,
            mean=(0.5,),
            std=(0.5,),
        )
