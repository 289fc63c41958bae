"""The interface of data sets: settings, `load`, and loaded images that are read in batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from exitkit.data.augment import crops_and_flips
from exitkit.data.inventory import Inventory
from exitkit.data.preprocessing import Preprocessing
from exitkit.data.split import Split
from exitkit.errors import UserError, unknown
from exitkit.plugins import configure, setting

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


class Batch(NamedTuple):
    """Images [B, C, H, W], normalised float32, and labels [B], int64 from 0."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataSet:
    """A data set that can be loaded; its fields are its settings.

    Class attributes:
        house: default recipe of runs on this data set: backbone, epochs, batch_size, lr, schedule, milestones,
            weight_decay.
        split_seed: seed of the hold-out split; fixed per data set, so that all runs share one split.
        catalogued: numbers of images that are not test images, of test images, and of classes, for data sets that are
            always the same; `exitkit compare --plan --no-data` shows them.
    """

    house: ClassVar[dict[str, Any]] = {
        "backbone": "msdnet-cifar-k7",
        "epochs": 300,
        "batch_size": 64,
        "lr": 0.1,
        "schedule": "step",
        "milestones": (0.5, 0.75),
        "weight_decay": 1e-4,
    }
    split_seed: ClassVar[int] = 0
    catalogued: ClassVar[tuple[int, int, int] | None] = None

    validation: int = setting(5000, "number of validation images, held out of the training images, stratified")
    val_transform: Literal["eval", "train"] = setting(
        "eval", "transform of validation images: that of evaluation, or the training augmentation as in the papers"
    )

    per_class: int | None = setting(None, "number of training images kept per class (the first ones); none: all")
    thin_validation: bool | None = setting(
        None,
        "whether per_class also thins the validation images, in proportion; none: yes, unless validation is set",
        added=True,
        earlier=False,
        kw_only=True,
    )
    imbalance: float = setting(1.0, "long tail: images kept of the first class over those of the last; 1: no long tail")

    def __post_init__(self) -> None:
        if self.validation is not None and self.validation < 1:
            raise UserError(f"validation is {self.validation}; expected at least 1, to choose thresholds")
        if self.per_class is not None and self.per_class < 1:
            raise UserError(f"per_class is {self.per_class}; expected at least 1")
        if self.per_class is None and self.thin_validation:
            raise UserError("thin_validation is true, which has an effect only with per_class; expected per_class, too")
        if self.per_class is not None and self.thin_validation is None:
            usual = {field.name: field.default for field in dataclasses.fields(self)}["validation"]
            object.__setattr__(self, "thin_validation", self.validation == usual)
        if not (self.imbalance >= 1 and math.isfinite(self.imbalance)):
            raise UserError(f"imbalance is {self.imbalance}; expected at least 1 (1: no long tail)")

    def digest(self, data_dir: Path | None) -> str | None:
        """Return a digest of the image files, for data sets that are read from the user's folder.

        None for data sets whose images are fixed, and if the folder does not exist.
        """
        return None

    def suited(self, network: Preprocessing | None) -> Self:
        """Return the data set, with the settings that are none taken from the network's own preprocessing.

        Data sets of images of one size have no such settings.
        """
        return self

    def root(self, data_dir: Path | None) -> Path | None:
        """Return the folder that the names of image files are relative to; None if it is not known."""
        return data_dir

    def restore(self, inventory: Inventory, root: Path, class_names: list[str], split: Split) -> Data:
        """Return the images of a run from the table of its files, without looking for files.

        It is called only if the loaded images have an inventory (see `Data.inventory`).

        Args:
            inventory: the table.
            root: the folder of the files.
            class_names: the names of the classes.
            split: the split of the run.
        """
        raise NotImplementedError

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """Read the images, or prepare to read them on demand.

        Args:
            data_dir: folder that contains the images, or to download them to.
            download: whether missing images may be downloaded.

        Raises:
            UserError: the images are missing, damaged, or too few for the settings.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """Loaded images. Indices refer to the data set's original order.

    Attributes:
        class_names: one name per class, in the order of the labels.
        input_shape: (channels, height, width) of a network's input.
        train_labels, test_labels: int64 [N], labels of all images that the `train` and `validation` indices, and the
            `test` indices, refer to.
        split: indices of the training, validation and test images.
        passed_over: what a listing of files passed over, one text per reason.
    """

    class_names: list[str]
    input_shape: tuple[int, int, int]
    train_labels: Tensor
    test_labels: Tensor
    split: Split
    passed_over: Sequence[str] = field(default=(), kw_only=True)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def labels(self, part: Part) -> Tensor:
        """Return the labels of a part, int64 [n], in the order of its positions.

        Raises:
            UserError: there is no such part.
        """
        if part not in get_args(Part):
            raise unknown("part", str(part), get_args(Part))
        return (self.test_labels if part == "test" else self.train_labels)[getattr(self.split, part)]

    def check(self) -> str:
        """Check before training that all images can be read; return what was checked, as text, or "".

        Raises:
            UserError: images are missing or damaged.
        """
        return ""

    def inventory(self, root: Path) -> Inventory | None:
        """Return the table of the image files, with names relative to `root`; None if the images are not files."""
        return None

    def with_split(self, split: Split) -> Self:
        """Return the same images with a stored split.

        Raises:
            UserError: the split belongs to another data set, or is damaged.
        """
        split.check(self.split, len(self.train_labels), len(self.test_labels))
        return dataclasses.replace(self, split=split)

    def on(self, device: torch.device) -> Self:
        """Return the same images, prepared for batches on `device`; the batches have the same values."""
        return self

    def batches(self, part: Part, positions: Sequence[Tensor], *, augment: bool, seed: int) -> Iterator[Batch]:
        """Yield one batch per tensor of positions (int64, 0..n-1 within the part).

        An image's augmentation depends only on `seed` and its position, not on batches, ranks or workers.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TensorData(Data):
    """Images in memory, stored as uint8; augmented and normalised per batch.

    Attributes:
        train_images, test_images: uint8 [N, C, H, W].
        mean, std: per channel, of pixel values scaled to 0..1.
        padding: pixels of zero padding before a random crop to the original size and a random flip; 0: no augmentation.
    """

    train_images: Tensor
    test_images: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0

    def on(self, device: torch.device) -> Self:
        """Return the same images in the device's memory, as uint8 (all of CIFAR: 180 MB)."""
        held = {name: getattr(self, name).to(device) for name in ("train_images", "test_images")}
        return dataclasses.replace(self, **held)

    def batches(self, part: Part, positions: Sequence[Tensor], *, augment: bool, seed: int) -> Iterator[Batch]:
        """See `Data.batches`."""
        images = self.test_images if part == "test" else self.train_images
        indices, labels = getattr(self.split, part), self.labels(part)
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1) * 255
        scale = 1 / (torch.tensor(self.std, device=images.device).view(1, -1, 1, 1) * 255)
        draws = None
        if augment and self.padding:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers for every device
            size = (len(indices), 2)
            offsets = torch.randint(2 * self.padding + 1, size, generator=generator)
            flips = torch.rand(len(indices), generator=generator) < 0.5
            draws = offsets.to(images.device), flips.to(images.device)
        indices, labels = indices.to(images.device), labels.to(images.device)
        for batch in positions:
            batch = batch.to(images.device, non_blocking=True)
            selected = images[indices[batch]]
            if draws is not None:
                selected = crops_and_flips(selected, self.padding, draws[0][batch], draws[1][batch])
            yield Batch((selected - mean) * scale, labels[batch])


def build_dataset(name: str, settings: Mapping[str, Any]) -> DataSet:
    """Return the data set called `name` with these settings; its `load` reads the images.

    Raises:
        UserError: the name or a setting is unknown, a value is invalid, or the class is not that of a data set.
    """
    dataset: DataSet = configure("dataset", name, settings)
    lacks = [part for part in ("house", "load", "digest", "per_class", "imbalance") if not hasattr(dataset, part)]
    if lacks or getattr(type(dataset), "load", None) is DataSet.load:
        missing = lacks[0] if lacks else "load"
        raise UserError(f"data set {name} has no {missing}; expected a subclass of exitkit.data.base.DataSet")
    unlisted = dataset.house.keys() - DataSet.house.keys() if isinstance(dataset.house, Mapping) else {"(no keys)"}
    if unlisted or "backbone" not in dataset.house:
        expected = f"a dictionary with backbone and any of {', '.join(list(DataSet.house)[1:])}"
        raise UserError(f"house of data set {name} is {dataset.house!r:.80}; expected {expected}")
    return dataset
