"""Folders of images with one subfolder per class: ImageNet, or the user's own images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from exitkit.data.base import Data, DataSet
from exitkit.data.image_files import FolderData, check_headers, digest_of, list_images
from exitkit.data.split import Split, hold_out
from exitkit.errors import UserError
from exitkit.plugins import setting

_TEST_SHARE = 0.2  # of the images of a folder without test images


@dataclass(frozen=True)
class ImageFolder(DataSet):
    """Your own images: DIR/train and DIR/test (or val) with one folder per class, or class folders only.

    If DIR has train, val and test, val is the validation part, unless `validation` is set. If DIR has class folders
    only, a fifth of the images is drawn as the test part, stratified.
    """

    house: ClassVar[dict[str, Any]] = DataSet.house | {
        "backbone": "msdnet-imagenet-s4",
        "epochs": 90,
        "milestones": (1 / 3, 2 / 3),
    }
    testing: ClassVar[tuple[str, ...]] = ("test", "val")

    validation: int | None = setting(  # type: ignore[assignment]
        None,
        "number of validation images, held out of the training images, stratified; none: the images of val if test "
        "exists, too, otherwise a tenth",
    )
    image_size: int = setting(224, "height and width that images are resized to, in pixels")
    workers: int | None = setting(None, "processes that read images; none: one per CPU core, at most 4", execution=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 8:
            raise UserError(f"image_size is {self.image_size}; expected at least 8")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers is {self.workers}; expected at least 0")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """List the images; see `DataSet.load`."""
        if data_dir is None:
            raise UserError("this data set is read from a folder of images; expected --data-dir DIR")
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is not a folder; expected a folder with one subfolder per class")
        parts = self._parts(data_dir)
        names, paths, labels = list_images(parts[0])
        all_indices = torch.arange(len(labels))
        if len(parts) == 1:
            test_paths, test_labels = paths, labels
            count = max(round(_TEST_SHARE * len(labels)), len(names))
            pool, test = hold_out(labels, all_indices, count, self.split_seed, "a test set", names)
        else:
            test_paths, test_labels = _list_same_classes(names, parts[0], parts[1])
            pool, test = all_indices, torch.arange(len(test_labels))
        if len(parts) == 3:
            val_paths, val_labels = _list_same_classes(names, parts[0], parts[2])
            train, validation = pool, len(labels) + torch.arange(len(val_labels))
            paths, labels = paths + val_paths, torch.cat([labels, val_labels])
        else:
            count = self.validation or max(len(pool) // 10, len(names))
            train, validation = hold_out(labels, pool, count, self.split_seed, "a validation set", names)
        check_headers(paths if test_paths is paths else paths + test_paths)
        shape = (3, self.image_size, self.image_size)
        split = Split(train, validation, test)
        workers = min(_cores(), 4) if self.workers is None else self.workers
        return FolderData(names, shape, labels, test_labels, split, paths, test_paths, workers)

    def digest(self, data_dir: Path | None) -> str | None:
        """See `DataSet.digest`; it changes if images are repaired, added or removed."""
        if data_dir is None or not data_dir.is_dir():
            return None
        return digest_of(data_dir, [path for part in self._parts(data_dir) for path in list_images(part)[1]])

    def _parts(self, folder: Path) -> list[Path]:
        """Return the folders of the training, test and (if used) validation images, or one folder that contains all."""
        train, others = folder / "train", [folder / name for name in self.testing if (folder / name).is_dir()]
        if train.is_dir() and others:
            return [train, *(others if self.validation is None else others[:1])]
        if train.is_dir() or others:
            has, lacks = ("train", " or ".join(self.testing)) if train.is_dir() else (others[0].name, "train")
            raise UserError(f"{folder} has the subfolder {has} but not {lacks}; expected both")
        return [folder]


@dataclass(frozen=True)
class ImageNet(ImageFolder):
    """ImageNet: DIR/train and DIR/val with one folder per class; crops and flips as in the papers."""

    house: ClassVar[dict[str, Any]] = ImageFolder.house | {"batch_size": 256}
    testing: ClassVar[tuple[str, ...]] = ("val",)

    validation: int | None = setting(50000, "number of validation images, held out of the training images, stratified")

    def digest(self, data_dir: Path | None) -> str | None:
        """Return None: the images are fixed."""
        return None

    def _parts(self, folder: Path) -> list[Path]:
        parts = super()._parts(folder)
        if len(parts) == 1:
            raise UserError(
                f"{folder} is not laid out as ImageNet; expected the folders train and val, each with one "
                "folder per class (for class folders only: --dataset folder)"
            )
        return parts


def _cores() -> int:
    """Return the number of CPU cores that this process may use, or of the machine if the system does not report it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _list_same_classes(names: list[str], train: Path, other: Path) -> tuple[list[str], Tensor]:
    """Return the paths and labels of the images in `other`, whose classes must be those of the training images."""
    other_names, paths, labels = list_images(other)
    differing = sorted(set(names) ^ set(other_names))
    if differing:
        raise UserError(
            f"{train} has {len(names)} classes and {other} has {len(other_names)}; expected the same classes "
            f"(not in both: {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''})"
        )
    return paths, labels
