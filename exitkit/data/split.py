"""Which images train, which find thresholds, which test: drawn once from the data set's own seed, stratified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exitkit.errors import UserError
from exitkit.files import load_tensors, save_tensors


@dataclass(frozen=True)
class Split:
    """Indices, int64: `train` and `validation` into the training images, `test` into the test images."""

    train: Tensor
    validation: Tensor
    test: Tensor

    def save(self, path: Path) -> None:
        """Write it (safetensors)."""
        save_tensors(path, {"train": self.train, "validation": self.validation, "test": self.test})

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read it.

        Raises:
            UserError: the file is missing, damaged or no split.
        """
        tensors = load_tensors(path)
        if tensors.keys() != {"train", "validation", "test"} or any(t.dtype != torch.int64 for t in tensors.values()):
            raise UserError(f"{path} is no split; expected indices called train, validation and test")
        return cls(**tensors)

    def check(self, training: int, testing: int) -> None:
        """Check that it fits `training` and `testing` images.

        Raises:
            UserError: it points to images that are not there.
        """
        for name, indices, count in (
            ("train", self.train, training),
            ("validation", self.validation, training),
            ("test", self.test, testing),
        ):
            if len(indices) == 0 or indices.min() < 0 or indices.max() >= count:
                raise UserError(
                    f"the stored split's {name} part does not fit these images ({count} are here); "
                    "is --data-dir another data set than the run's?"
                )


def hold_out(labels: Tensor, pool: Tensor, count: int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """Draw `count` of the indices in `pool`, with each class's share kept.

    Args:
        labels: [N], of all images.
        pool: which of them may be drawn, int64.
        count: how many to draw.
        seed: the data set's.
        what: what they are for, for error messages.

    Returns:
        (the rest, those drawn), each in ascending order.

    Raises:
        UserError: too many, or too few for a class to be on both sides.
    """
    from sklearn.model_selection import train_test_split

    classes, sizes = labels[pool].unique(return_counts=True)
    if not len(classes) <= count <= len(pool) - len(classes):
        raise UserError(
            f"{what} of {count} images can't be drawn from {len(pool)} images in {len(classes)} classes; "
            f"expected {len(classes)} to {len(pool) - len(classes)}, so that every class is on both sides"
        )
    if sizes.min() < 2:
        raise UserError(f"a class has a single training image, and {what} needs one of each; expected 2 or more")
    rest, drawn = train_test_split(pool.numpy(), test_size=count, random_state=seed, stratify=labels[pool].numpy())
    return torch.from_numpy(rest).sort().values, torch.from_numpy(drawn).sort().values
