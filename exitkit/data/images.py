"""Data sets of colour images of any size: their settings, and the parts of images that are not split yet."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from exitkit.data.base import Data, DataSet
from exitkit.data.image_files import ImageFiles
from exitkit.data.inventory import Inventory
from exitkit.data.lazy import LazyData
from exitkit.data.preprocessing import Interpolation, Preprocessing
from exitkit.data.split import Split, hold_out
from exitkit.errors import UserError
from exitkit.plugins import setting

_TEST_SHARE = 0.2  # of images without a test part
_MOST_WORKERS = 1024
_LARGEST = 8192  # pixels of a side; a batch of larger images fits into no memory


@dataclass(frozen=True)
class ImageDataSet(DataSet):
    """Colour images of any size, which are read on demand, resized, augmented in training and normalised."""

    house: ClassVar[dict[str, Any]] = DataSet.house | {
        "backbone": "msdnet-imagenet-s4",
        "epochs": 90,
        "milestones": (1 / 3, 2 / 3),
    }

    validation: int | None = setting(  # type: ignore[assignment]
        None,
        "number of validation images, held out of the training images, stratified; none: the validation part if there "
        "is one, otherwise a tenth",
    )
    image_size: int | None = setting(
        None, "height and width that images are resized to, in pixels; none: the network's own size, or 224"
    )
    workers: int | None = setting(None, "processes that read images; none: one per CPU core, at most 4", execution=True)
    mean: tuple[float, ...] | None = setting(
        None, "mean of each channel, of pixel values scaled to 0..1; none: the network's own, or ImageNet's", added=True
    )
    std: tuple[float, ...] | None = setting(None, "standard deviation of each channel; none: as mean", added=True)
    crop: float | None = setting(
        None, "share of the shorter side that the centre crop keeps; none: the network's own, or 0.875", added=True
    )
    interpolation: Interpolation | None = setting(
        None, "how images are resized; none: the network's own, or bilinear", added=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None and not 8 <= self.image_size <= _LARGEST:
            raise UserError(f"image_size is {self.image_size}; expected 8 to {_LARGEST}")
        if self.workers is not None and not 0 <= self.workers <= _MOST_WORKERS:
            raise UserError(f"workers is {self.workers}; expected 0 to {_MOST_WORKERS}")
        for name, low in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            if values is not None and (len(values) != 3 or not all(low < value < math.inf for value in values)):
                raise UserError(f"{name} is {values}; expected three numbers{' above 0' if low == 0 else ''}")
        if self.crop is not None and not 0.01 <= self.crop <= 1:
            raise UserError(f"crop is {self.crop}; expected a share between 0.01 and 1")

    def suited(self, network: Preprocessing | None) -> Self:
        """See `DataSet.suited`; only values that differ from the data set's own are set."""
        network, own = network or Preprocessing(), Preprocessing()
        values: dict[str, Any] = {"image_size": network.size}
        for name in ("mean", "std", "crop", "interpolation"):
            if getattr(network, name) != getattr(own, name):
                values[name] = getattr(network, name)
        return dataclasses.replace(self, **{key: value for key, value in values.items() if getattr(self, key) is None})

    @property
    def preprocessing(self) -> Preprocessing:
        """The transform of the images."""
        names = {"size": "image_size"} | {name: name for name in ("mean", "std", "crop", "interpolation")}
        chosen = {field: getattr(self, name) for field, name in names.items()}
        return Preprocessing(**{field: value for field, value in chosen.items() if value is not None})

    @property
    def readers(self) -> int:
        """The number of processes that read images."""
        return min(_cores(), 4) if self.workers is None else self.workers

    def arranged(self, names: Sequence[str], train: Tensor, test: Tensor | None, validation: Tensor | None) -> Arranged:
        """Return the labels and the split of up to three given parts; missing parts are drawn from the training images.

        A missing test part is a fifth of the training images. A missing validation part, or one of another number that
        `validation` asks for, is drawn from the remaining ones.

        Args:
            names: the class names.
            train, test, validation: labels of the given parts, int64 [n].

        Raises:
            UserError: there are too few images.
        """
        pool = torch.arange(len(train))
        if test is None:
            count = max(round(_TEST_SHARE * len(train)), len(names))
            pool, tested = hold_out(train, pool, count, self.split_seed, "a test set", names)
        else:
            tested = torch.arange(len(test))
        if validation is not None and self.validation is None:
            held = len(train) + torch.arange(len(validation))
            labels = torch.cat([train, validation])
        else:
            count = self.validation or max(len(pool) // 10, len(names))
            pool, held = hold_out(train, pool, count, self.split_seed, "a validation set", names)
            labels = train
        return Arranged(labels, labels if test is None else test, Split(pool, held, tested))

    def of_files(self, names: list[str], arranged: Arranged, train_paths: list[str], test_paths: list[str]) -> LazyData:
        """Return images that are files; the indices of the split refer to the paths."""
        shape = (3, self.preprocessing.size, self.preprocessing.size)
        sources = ImageFiles(train_paths), ImageFiles(test_paths)
        return LazyData(names, shape, *arranged, *sources, self.preprocessing, self.readers)

    def restore(self, inventory: Inventory, root: Path, class_names: list[str], split: Split) -> Data:
        """See `DataSet.restore`."""
        arranged = Arranged(inventory.train_labels, inventory.test_labels, split)
        return self.of_files(class_names, arranged, *inventory.paths(root))


class Arranged(NamedTuple):
    """Labels and split of a data set: its training labels are those of the training part, then of a validation part."""

    train_labels: Tensor
    test_labels: Tensor
    split: Split


def _cores() -> int:
    """Return the number of CPU cores that this process may use, or of the machine if the system does not report it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
