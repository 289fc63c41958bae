"""Which images train, which find thresholds, which test: drawn once from the data set's own seed, stratified."""

from __future__ import annotations

from collections.abc import Sequence
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

    def save(self, path: Path, run: str | None = None) -> None:
        """Write it (safetensors), as that of a run by name."""
        save_tensors(path, {"train": self.train, "validation": self.validation, "test": self.test}, run)

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read it.

        Raises:
            UserError: the file is missing, damaged or no split.
        """
        tensors = load_tensors(path)
        if tensors.keys() != {"train", "validation", "test"} or any(
            tensor.dtype != torch.int64 or tensor.dim() != 1 for tensor in tensors.values()
        ):
            raise UserError(f"{path} is no split; expected indices called train, validation and test")
        return cls(**tensors)

    def check(self, own: Split, training: int, testing: int) -> None:
        """Check that it can stand in for `own`, the split that the images were loaded with.

        Args:
            own: what it has to count as many images as: one more in a folder, and the indices mean other images.
            training, testing: how many images the indices may point to.

        Raises:
            UserError: it is of fewer or more images, points to some that are not there, or to some twice.
        """
        learning, whole = torch.cat([self.train, self.validation]), torch.cat([own.train, own.validation])
        for name, indices, expected, count in (
            ("training and validation", learning, len(whole), training),
            ("test", self.test, len(own.test), testing),
        ):
            if len(indices) != expected:
                raise UserError(
                    f"the stored split has {len(indices)} {name} images and here are {expected}; "
                    "is --data-dir another data set than the run's, or were files added or removed?"
                )
            if indices.min() < 0 or indices.max() >= count or len(indices.unique()) < len(indices):
                raise UserError(
                    f"the stored split's {name} indices are not {expected} different ones from 0 to {count - 1}; "
                    "it is damaged"
                )


def hold_out(
    labels: Tensor, pool: Tensor, count: int, seed: int, what: str, names: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `count` of the indices in `pool`, with each class's share kept.

    Args:
        labels: [N], of all images.
        pool: which of them may be drawn, int64.
        count: how many to draw.
        seed: the data set's.
        what: what they are for, for error messages.
        names: what the classes are called, for error messages.

    Returns:
        (the rest, those drawn), each in ascending order.

    Raises:
        UserError: too many, or too few for a class to be on both sides.
    """
    # Imported when used: scikit-learn takes a second to load.
    from sklearn.model_selection import train_test_split

    classes, sizes = labels[pool].unique(return_counts=True)
    if not len(classes) <= count <= len(pool) - len(classes):
        raise UserError(
            f"{what} of {count} images can't be drawn from {len(pool)} images in {len(classes)} classes; "
            f"expected {len(classes)} to {len(pool) - len(classes)}, one a class at least on both sides"
        )
    if sizes.min() < 2:
        rare = int(classes[sizes.argmin()])
        raise UserError(
            f"class {names[rare] if names else rare} has a single image to draw {what} from; expected 2 or more"
        )
    rest, drawn = train_test_split(pool.numpy(), test_size=count, random_state=seed, stratify=labels[pool].numpy())
    return torch.from_numpy(rest).sort().values, torch.from_numpy(drawn).sort().values
