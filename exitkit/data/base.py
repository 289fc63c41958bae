"""What a data set is: settings, a `load`, and loaded images that come in batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from exitkit.data.augment import crops_and_flips
from exitkit.data.split import Split
from exitkit.errors import UserError
from exitkit.plugins import configure, setting

Part = Literal["train", "validation", "test"]


class Batch(NamedTuple):
    """Images [B, C, H, W], normalised floats, and labels [B], integers from 0."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataSet:
    """A data set that can be loaded; its fields are its settings.

    Class attributes:
        house: the recipe used with it unless told otherwise: backbone, epochs, batch_size, lr, schedule, milestones,
            weight_decay.
        split_seed: the seed of the hold-out split; the data set's own, so that all runs share one split.
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

    validation: int = setting(5000, "images held out of the training images, stratified")
    val_transform: Literal["eval", "train"] = setting(
        "eval", "read validation images plainly, or through the training augmentation (the papers' habit)"
    )

    per_class: int | None = setting(None, "keep the first so many training images of each class; none: all")
    imbalance: float = setting(1.0, "make a long tail: how many times as many images the first class keeps as the last")

    def __post_init__(self) -> None:
        if self.validation is not None and self.validation < 1:
            raise UserError(f"validation is {self.validation}; expected at least 1, since thresholds come from there")
        if self.per_class is not None and self.per_class < 1:
            raise UserError(f"per_class is {self.per_class}; expected at least 1")
        if not (self.imbalance >= 1 and math.isfinite(self.imbalance)):
            raise UserError(f"imbalance is {self.imbalance}; expected at least 1 (1: no long tail)")

    def digest(self, data_dir: Path | None) -> str | None:
        """Return what tells the images there from others, for data sets that are whatever lies in a folder.

        None where they are always the same, or can't be looked at.
        """
        return None

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """Read the images, or get ready to.

        Args:
            data_dir: where they lie, or are downloaded to.
            download: whether they may be fetched.

        Raises:
            UserError: they are not there, damaged, or too few for the settings.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """Loaded images. Indices count them in the data set's own order.

    Attributes:
        class_names: one name a class, in the order of the labels.
        input_shape: (channels, height, width) of what a network gets.
        train_labels, test_labels: labels of all images that `train`/`validation` and `test` indices point to.
        split: which of them are used for what.
    """

    class_names: list[str]
    input_shape: tuple[int, int, int]
    train_labels: Tensor
    test_labels: Tensor
    split: Split

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def labels(self, part: Part) -> Tensor:
        """Return the labels [n] of a part, in the order of its positions."""
        return (self.test_labels if part == "test" else self.train_labels)[getattr(self.split, part)]

    def with_split(self, split: Split) -> Self:
        """Return the same images under a stored split.

        Raises:
            UserError: it is another data set's, or damaged.
        """
        split.check(self.split, len(self.train_labels), len(self.test_labels))
        return dataclasses.replace(self, split=split)

    def on(self, device: torch.device) -> Self:
        """Return the same images, held by a device where they fit there; the batches are the same wherever they are."""
        return self

    def batches(self, part: Part, positions: Sequence[Tensor], *, augment: bool, seed: int) -> Iterator[Batch]:
        """Yield one batch for each tensor of positions (0..n-1 within the part).

        An image's augmentation depends on `seed` and its position alone, whatever the batches, ranks or workers.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TensorData(Data):
    """Images that fit into memory, as bytes; augmented and normalised a batch at a time.

    Attributes:
        train_images, test_images: uint8 [N, C, H, W].
        mean, std: of each channel, of values 0..1.
        padding: zeros around an image before a random crop to its size and a random flip; 0: no augmentation.
    """

    train_images: Tensor
    test_images: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0

    def on(self, device: torch.device) -> Self:
        """Return the same images in the device's memory: bytes, so that all of CIFAR takes 180 MB there."""
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
            generator = torch.Generator().manual_seed(seed)  # the CPU's, so that every device draws the same
            size = (len(indices), 2)
            offsets = torch.randint(2 * self.padding + 1, size, generator=generator)
            flips = torch.rand(len(indices), generator=generator) < 0.5
            draws = offsets.to(images.device), flips.to(images.device)
        indices, labels = indices.to(images.device), labels.to(images.device)
        for batch in positions:
            batch = batch.to(images.device, non_blocking=True)
            chosen = images[indices[batch]]
            if draws is not None:
                chosen = crops_and_flips(chosen, self.padding, draws[0][batch], draws[1][batch])
            yield Batch((chosen - mean) * scale, labels[batch])


def build_dataset(name: str, settings: Mapping[str, Any]) -> DataSet:
    """Return the description of a data set; its `load` reads the images."""
    dataset: DataSet = configure("dataset", name, settings)
    return dataset
