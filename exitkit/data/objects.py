"""Data sets made of map-style PyTorch data sets, such as those that a script has already."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from exitkit.data.base import Data, DataSet
from exitkit.data.images import ImageDataSet
from exitkit.data.items import Items, Joined, Keys
from exitkit.data.lazy import LazyData
from exitkit.data.preprocessing import Preprocessing
from exitkit.errors import UserError

_TRANSFORM = ("image_size", "mean", "std", "crop", "interpolation")
"""The settings of the transform, which the data set has applied itself if its images are final."""


@dataclass(frozen=True)
class ItemDataSet(ImageDataSet, abc.ABC):
    """A data set whose parts are map-style PyTorch data sets; a subclass returns them in `parts`."""

    @abc.abstractmethod
    def parts(self, data_dir: Path | None) -> Mapping[str, Items]:
        """Return the parts: train, and test and validation where they are given.

        Raises:
            UserError: they can't be read.
        """

    def names(self, parts: Mapping[str, Items]) -> list[str]:
        """Return the class names, by default those that the training part knows, or numbers."""
        highest = max(int(part.labels.max()) for part in parts.values())
        return parts["train"].class_names() or [str(number) for number in range(highest + 1)]

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """Look up the labels and draw the parts that are not given; see `DataSet.load`."""
        parts = self.parts(data_dir)
        names = self.names(parts)
        _check_labels(parts, names)
        train, test, validation = parts["train"], parts.get("test"), parts.get("validation")
        self._check_transforms(parts)
        given = [part.labels if part else None for part in (test, validation)]
        arranged = self.arranged(names, train.labels, *given)
        training = Joined([train, validation] if validation and self.validation is None else [train])
        sources = training, training if test is None else Joined([test])
        chosen = None if train.final_shape else self.preprocessing
        shape = train.final_shape or (3, self.preprocessing.size, self.preprocessing.size)
        return LazyData(names, shape, *arranged, *sources, chosen, self.readers)

    def _check_transforms(self, parts: Mapping[str, Items]) -> None:
        """Check that the transforms of the parts agree with each other and with the settings."""
        train = parts["train"]
        for name, part in parts.items():
            if part.final_shape != train.final_shape:
                kinds = [_kind(one.final_shape) for one in (train, part)]
                raise UserError(f"the train data has {kinds[0]}, and the {name} data {kinds[1]}; expected the same")
        if train.final_shape:
            given = [name for name in _TRANSFORM if getattr(self, name) is not None]
            if given:
                raise UserError(
                    f"{given[0]} is set, but the data set gives float32 tensors, which are used as they are; "
                    "let it give PIL images or uint8 tensors, or leave the setting out"
                )
        drawn = [name for name in ("validation", "test") if name not in parts]
        if drawn and self.val_transform == "eval" and train.augments():
            raise UserError(
                f"the train data transforms its images at random, and so would {' and '.join(drawn)} images that are "
                f"drawn from it; give {' and '.join(drawn)}, or leave the augmentation to exitkit"
            )

    def digest(self, data_dir: Path | None) -> str | None:
        """See `DataSet.digest`: of the number and labels of all images, and the content of at most 64 per part."""
        digest = hashlib.sha256()
        for part in self.parts(data_dir).values():
            part.update(digest)
        return digest.hexdigest()[:16]


def from_datasets(
    train: Any,
    test: Any = None,
    validation: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    keys: Keys | None = None,
) -> type[DataSet]:
    """Make a data set of exitkit from map-style PyTorch data sets; `exitkit.register` gives it a name.

    An item is a tuple (image, label) or a dictionary. PIL images and uint8 tensors [C, H, W] are resized, augmented in
    training and normalised by exitkit; float32 tensors [C, H, W] are used as they are, so that your transforms decide
    everything. Random transforms may draw from the global generators of torch, NumPy and Python, which are seeded for
    each image and epoch.

    A run records a fingerprint of the data: the number of images and all labels of each part, and the content of at
    most 64 evenly spaced images per part. Settings: `workers`, `validation`, `image_size` and those of `ImageDataSet`.

    Args:
        train: training images.
        test: test images; None: a fifth of the training images.
        validation: images for thresholds and calibration; None: a tenth of the other training images.
        class_names: names of the classes; None: those that the data set knows (`classes`, features), or numbers.
        keys: where an item has its image and its label; None: the first two places, or the usual names (`image`, `img`
            or `pixel_values`; `label`, `labels` or `target`).

    Raises:
        UserError: a data set has no length or no items, or an item has no image or no label.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(60, 3, 8, 8, dtype=torch.uint8), torch.arange(60) % 3
        >>> exitkit.register("dataset", "mine", exitkit.data.from_datasets(TensorDataset(images, labels)))
        >>> exitkit.Recipe.make(dataset="mine").dataset
        'mine'
    """
    given = {"train": train, "test": test, "validation": validation}
    known = {name: Items(items, name, keys) for name, items in given.items() if items is not None}
    if "train" not in known:
        raise UserError("train is None; expected a data set")
    if isinstance(class_names, str):
        raise UserError(f"class_names is {class_names!r}; expected a list of names")
    chosen = None if class_names is None else [str(name) for name in class_names]
    twice = [name for name in chosen or () if (chosen or []).count(name) > 1]
    if twice:
        raise UserError(f"class_names has {twice[0]!r} twice; expected one name per class")

    @dataclass(frozen=True)
    class Given(ItemDataSet):
        """Data sets of a script."""

        objects: ClassVar[Mapping[str, Items]] = known

        def parts(self, data_dir: Path | None) -> Mapping[str, Items]:
            return self.objects

        def names(self, parts: Mapping[str, Items]) -> list[str]:
            return super().names(parts) if chosen is None else chosen

        def suited(self, network: Preprocessing | None) -> Self:
            return self if self.objects["train"].final_shape else super().suited(network)

    return Given


def _kind(final_shape: tuple[int, ...] | None) -> str:
    if final_shape is None:
        return "PIL images or uint8 tensors"
    return f"float32 tensors of {'x'.join(map(str, final_shape))}"


def _check_labels(parts: Mapping[str, Items], names: Sequence[str]) -> None:
    for name, part in parts.items():
        highest = int(part.labels.max())
        negative = (part.labels < 0).nonzero().flatten().tolist()
        if negative:
            label = int(part.labels[negative[0]])
            raise UserError(f"item {negative[0]} of the {name} data has the label {label}; expected an integer, from 0")
        if highest >= len(names):
            raise UserError(
                f"the {name} data has the label {highest}, and there are {len(names)} class names; expected labels "
                f"from 0 to {len(names) - 1}"
            )
    missing = sorted(set(range(len(names))) - set(parts["train"].labels.tolist()))
    if missing:
        raise UserError(f"the train data has no image of class {names[missing[0]]}; expected images of every class")
    if len(names) < 2:
        raise UserError(f"the train data has {len(names)} class; expected at least 2")
