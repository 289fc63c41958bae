"""scikit-learn's digits: 1,797 images that are installed with the package and need no download."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from exitkit.data.base import Data, DataSet, TensorData
from exitkit.data.split import Split, hold_out
from exitkit.errors import Note
from exitkit.plugins import setting

_TEST = 500


@dataclass(frozen=True)
class Digits(DataSet):
    """1,797 handwritten digits of scikit-learn, 8x8 scaled to 16x16, 10 classes; 500 test images."""

    house: ClassVar[dict[str, Any]] = DataSet.house | {
        "backbone": "msdnet-tiny",
        "epochs": 30,
        "schedule": "cosine",
        "milestones": (),
    }
    catalogued: ClassVar[tuple[int, int, int] | None] = (1797 - _TEST, _TEST, 10)

    validation: int = setting(200, "number of validation images, held out of the training images, stratified")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """Return the digits, which are part of scikit-learn; `download` is ignored, and `data_dir` with a `Note`."""
        if data_dir is not None:
            warnings.warn(
                Note(f"the digits are part of scikit-learn, so --data-dir {data_dir} is not used"), stacklevel=2
            )
        # Imported when used: scikit-learn takes a second to load.
        from sklearn.datasets import load_digits

        digits = load_digits()
        small = torch.from_numpy(digits.images).float().unsqueeze(1)
        large = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
        images = (large * 255 / 16).round().to(torch.uint8)
        labels = torch.from_numpy(digits.target).long()
        rest, test = hold_out(labels, torch.arange(len(labels)), _TEST, self.split_seed, "a test set")
        train, validation = hold_out(labels, rest, self.validation, self.split_seed, "a validation set")
        return TensorData(
            [str(name) for name in digits.target_names],
            (1, 16, 16),
            labels,
            labels,
            Split(train, validation, test),
            images,
            images,
            mean=(0.3046,),
            std=(0.3181,),
        )
