"""Folders of images, one subfolder a class: ImageNet, or anybody's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from exitkit.data.base import Batch, Data, DataSet, Part
from exitkit.data.split import Split, hold_out
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError
from exitkit.plugins import setting
from exitkit.randomness import derive

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TEST_SHARE = 0.2  # of the images of a folder that has no test images of its own

Listing = tuple[list[str], list[str], Tensor]
"""Class names, image paths and labels."""


class _Images(Dataset[tuple[Tensor, int]]):
    """Reads, transforms and seeds one image at a time, in whichever worker it falls to."""

    def __init__(self, paths: list[str], labels: Tensor, indices: Tensor, size: int, seed: int | None) -> None:
        self.paths, self.labels, self.indices = paths, labels, indices
        self.size, self.seed = size, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        index = int(self.indices[position])
        try:
            with Image.open(self.paths[index]) as file:
                image = file.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise UserError(f"image {self.paths[index]} can't be read: {error}") from None
        transform = _transform(self.size, self.seed is not None)
        if self.seed is None:
            return transform(image), int(self.labels[index])
        # The transforms draw from torch's global generator; what it was is put back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, position))
            return transform(image), int(self.labels[index])


def _transform(size: int, augment: bool) -> Any:
    """Return the papers' transform of an image to [3, size, size]."""
    v2 = torchvision("transforms.v2")
    if augment:
        shape = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    else:
        shape = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([*shape, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


@dataclass(frozen=True)
class FolderData(Data):
    """Images read from files as they are needed.

    Attributes:
        train_paths, test_paths: the files that the indices count.
        workers: processes that read them.
    """

    train_paths: list[str]
    test_paths: list[str]
    workers: int = 0

    def batches(self, part: Part, positions: Sequence[Tensor], *, augment: bool, seed: int) -> Iterator[Batch]:
        """See `Data.batches`."""
        testing = part == "test"
        images = _Images(
            self.test_paths if testing else self.train_paths,
            self.test_labels if testing else self.train_labels,
            getattr(self.split, part),
            self.input_shape[1],
            seed if augment else None,
        )
        torchvision("transforms.v2")  # here, so that workers do not each import (and mend) it
        loader = DataLoader(
            images,
            batch_sampler=[batch.tolist() for batch in positions],
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),  # else it would draw from the global one
        )
        try:
            for pixels, labels in loader:
                yield Batch(pixels, labels)
        except UserError as error:
            # A worker hands its error on with the whole traceback as text; the last line is what it said.
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("exitkit.errors.UserError: ")) from None


@dataclass(frozen=True)
class ImageFolder(DataSet):
    """Your own images: DIR/train and DIR/test (or val) with a folder a class, or class folders alone."""

    house: ClassVar[dict[str, Any]] = DataSet.house | {
        "backbone": "msdnet-imagenet-s4",
        "epochs": 90,
        "milestones": (1 / 3, 2 / 3),
    }
    training: ClassVar[tuple[str, ...]] = ("train",)
    testing: ClassVar[tuple[str, ...]] = ("test", "val")

    validation: int | None = setting(None, "images held out of the training images, stratified; none: a tenth")  # type: ignore[assignment]
    image_size: int = setting(224, "height and width that images are brought to")
    workers: int = setting(4, "processes that read images")

    def __post_init__(self) -> None:
        if self.validation is not None:
            super().__post_init__()
        if self.image_size < 8:
            raise UserError(f"image_size is {self.image_size}; expected at least 8")
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}; expected at least 0")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """List the images; see `DataSet.load`."""
        if data_dir is None:
            raise UserError("this data set is a folder of yours; say which by --data-dir DIR")
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is no folder; expected one with a subfolder for each class")
        parts = self._parts(data_dir)
        names, paths, labels = list_images(parts[0])
        if len(parts) == 2:
            pool = torch.arange(len(labels))
            test_names, test_paths, test_labels = list_images(parts[1])
            _check_classes(names, test_names, parts)
            test = torch.arange(len(test_labels))
        else:
            test_paths, test_labels = paths, labels
            count = max(round(_TEST_SHARE * len(labels)), len(names))
            pool, test = hold_out(labels, torch.arange(len(labels)), count, self.split_seed, "a test set")
        count = self.validation or max(len(pool) // 10, len(names))
        train, validation = hold_out(labels, pool, count, self.split_seed, "a validation set")
        shape = (3, self.image_size, self.image_size)
        split = Split(train, validation, test)
        return FolderData(names, shape, labels, test_labels, split, paths, test_paths, self.workers)

    def _parts(self, folder: Path) -> list[Path]:
        """Return the folders of training and test images, or one that has both."""
        train = next((folder / name for name in self.training if (folder / name).is_dir()), None)
        test = next((folder / name for name in self.testing if (folder / name).is_dir()), None)
        if train and test:
            return [train, test]
        if train or test:
            lacking = " or ".join(self.testing if train else self.training)
            raise UserError(f"{folder} has {(train or test).name} but no {lacking} beside it")  # type: ignore[union-attr]
        return [folder]


@dataclass(frozen=True)
class ImageNet(ImageFolder):
    """ImageNet: DIR/train and DIR/val with a folder a class; the papers' crops and flips."""

    house: ClassVar[dict[str, Any]] = ImageFolder.house | {"batch_size": 256}
    testing: ClassVar[tuple[str, ...]] = ("val",)

    validation: int | None = setting(50000, "images held out of the training images, stratified")

    def _parts(self, folder: Path) -> list[Path]:
        parts = super()._parts(folder)
        if len(parts) == 1:
            raise UserError(
                f"{folder} is not laid out as ImageNet; expected the folders train and val, each with a "
                "folder a class (for class folders alone: --dataset folder)"
            )
        return parts


def list_images(folder: Path) -> Listing:
    """List a folder's images: each subfolder is a class, and all images at any depth below it belong to it.

    Raises:
        UserError: no subfolders, or one without images.
    """
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{folder} has {len(classes)} class folders; expected at least 2, each with its images")
    paths: list[str] = []
    labels: list[int] = []
    for label, child in enumerate(classes):
        found = sorted(str(path) for path in child.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise UserError(f"class folder {child} holds no images; expected {', '.join(SUFFIXES[:3])}, ...")
        paths += found
        labels += [label] * len(found)
    return [child.name for child in classes], paths, torch.tensor(labels)


def _check_classes(train: list[str], test: list[str], parts: list[Path]) -> None:
    extra = sorted(set(train) ^ set(test))
    if extra:
        raise UserError(
            f"{parts[0]} has {len(train)} classes and {parts[1]} has {len(test)}; expected the same ones "
            f"(not in both: {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''})"
        )


__all__ = ["FolderData", "ImageFolder", "ImageNet", "list_images"]
