"""The training, validation and test parts of a data set: drawn once, with the data set's seed, stratified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exitkit.errors import UserError
from exitkit.escaping import counted
from exitkit.files import load_tensors, save_tensors


@dataclass(frozen=True)
class Split:
    """Indices, int64 [n]: `train` and `validation` of the training images, `test` of the test images."""

    train: Tensor
    validation: Tensor
    test: Tensor

    def save(self, path: Path, run: str | None = None) -> None:
        """Write the split (safetensors), with the name of its run if given."""
        save_tensors(path, {"train": self.train, "validation": self.validation, "test": self.test}, run)

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read a split.

        Raises:
            UserError: the file is missing or damaged, or is not a split.
        """
        tensors = load_tensors(path)
        if tensors.keys() != {"train", "validation", "test"} or any(
            tensor.dtype != torch.int64 or tensor.dim() != 1 for tensor in tensors.values()
        ):
            raise UserError(f"{path} is not a split; expected int64 indices called train, validation and test")
        return cls(**tensors)

    def without(self, validation: set[int], test: set[int]) -> Split:
        """Return the split without some of the indices of the validation and of the test part."""
        return Split(
            self.train,
            torch.tensor([index for index in self.validation.tolist() if index not in validation], dtype=torch.int64),
            torch.tensor([index for index in self.test.tolist() if index not in test], dtype=torch.int64),
        )

    def check(self, reference: Split, training: int, testing: int) -> None:
        """Check that the split can replace `reference`, the split that the images were loaded with.

        Args:
            reference: the split must have as many indices; if a file was added, indices refer to other images.
            training, testing: the number of training and test images that indices may refer to.

        Raises:
            UserError: the number of indices differs, or indices are out of range or not unique.
        """
        expected_train = len(reference.train) + len(reference.validation)
        for name, indices, expected, count in (
            ("training and validation", torch.cat([self.train, self.validation]), expected_train, training),
            ("test", self.test, len(reference.test), testing),
        ):
            if len(indices) != expected:
                raise UserError(
                    f"the stored split has {len(indices)} {name} images, but the data has {expected}; expected the "
                    "run's data set in --data-dir, without files added or removed"
                )
            valid = (indices >= 0) & (indices < count)
            if not valid.all() or len(indices.unique()) < len(indices):
                raise UserError(
                    f"the stored split is damaged: its {name} indices are not {expected} different integers from 0 "
                    f"to {count - 1}"
                )


def hold_out(
    labels: Tensor, pool: Tensor, count: int, seed: int, what: str, names: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `count` of the indices in `pool`, stratified by class, with at least one per class on both sides.

    Args:
        labels: labels of all images, int64 [N].
        pool: indices that may be drawn, int64 [n].
        count: number of indices to draw.
        seed: seed of the data set's split.
        what: name of the part in error messages ("a test set").
        names: class names for error messages; None: labels.

    Returns:
        (remaining indices, drawn indices), each in ascending order.

    Raises:
        UserError: `count` does not leave at least one image per class on both sides, or a class has a single image.
    """
    # Imported when used: scikit-learn takes a second to load.
    from sklearn.model_selection import train_test_split

    classes, sizes = labels[pool].unique(return_counts=True)
    if len(pool) < 2 * len(classes):
        raise UserError(
            f"{what} can't be drawn from {counted(len(pool), 'image')} in {counted(len(classes), 'class', 'classes')}; "
            f"expected at least {2 * len(classes)}, two per class"
        )
    if not len(classes) <= count <= len(pool) - len(classes):
        raise UserError(
            f"{what} of {counted(count, 'image')} can't be drawn from {counted(len(pool), 'image')} "
            f"in {counted(len(classes), 'class', 'classes')}; "
            f"expected {len(classes)} to {len(pool) - len(classes)}, at least one per class on both sides"
        )
    if sizes.min() < 2:
        rare = int(classes[sizes.argmin()])
        raise UserError(
            f"class {names[rare] if names else rare} has a single image to draw {what} from; expected 2 or more"
        )
    rest, drawn = train_test_split(pool.numpy(), test_size=count, random_state=seed, stratify=labels[pool].numpy())
    rest, drawn = torch.from_numpy(rest).sort().values, torch.from_numpy(drawn).sort().values
    # The shares of rare classes may be rounded to none, or to all.
    rest, drawn = _complete(labels, rest, drawn)
    drawn, rest = _complete(labels, drawn, rest)
    return rest, drawn


def _complete(labels: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides after an exchange of images, such that `target` has every class of `source`."""
    for absent in sorted(set(labels[source].tolist()) - set(labels[target].tolist())):
        counts = torch.bincount(labels[target])
        taken = source[labels[source] == absent][0]
        given = target[labels[target] == counts.argmax()][0]  # of the largest class, which keeps most of its share
        source = torch.cat([source[source != taken], given[None]]).sort().values
        target = torch.cat([target[target != given], taken[None]]).sort().values
    return source, target
