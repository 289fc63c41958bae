"""Folders of images, one subfolder a class: ImageNet, or anybody's own."""

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

_TEST_SHARE = 0.2  # of the images of a folder that has no test images of its own


@dataclass(frozen=True)
class ImageFolder(DataSet):
    """Your own images: DIR/train and DIR/test (or val) with a folder a class, or class folders alone.

    Where DIR has train, val and test, val is the validation part, unless a number of validation images is set. Of
    class folders alone a fifth is drawn for testing, stratified.
    """

    house: ClassVar[dict[str, Any]] = DataSet.house | {
        "backbone": "msdnet-imagenet-s4",
        "epochs": 90,
        "milestones": (1 / 3, 2 / 3),
    }
    testing: ClassVar[tuple[str, ...]] = ("test", "val")

    validation: int | None = setting(  # type: ignore[assignment]
        None, "images held out of the training images, stratified; none: those in val, if there is test too, or a tenth"
    )
    image_size: int = setting(224, "height and width that images are brought to")
    workers: int | None = setting(None, "processes that read images; none: one a core, at most 4", execution=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 8:
            raise UserError(f"image_size is {self.image_size}; expected at least 8")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers is {self.workers}; expected at least 0")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """List the images; see `DataSet.load`."""
        if data_dir is None:
            raise UserError("this data set is a folder of yours; say which by --data-dir DIR")
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is no folder; expected one with a subfolder for each class")
        parts = self._parts(data_dir)
        names, paths, labels = list_images(parts[0])
        everything = torch.arange(len(labels))
        if len(parts) == 1:
            test_paths, test_labels = paths, labels
            count = max(round(_TEST_SHARE * len(labels)), len(names))
            pool, test = hold_out(labels, everything, count, self.split_seed, "a test set", names)
        else:
            test_paths, test_labels = _list_same(names, parts[0], parts[1])
            pool, test = everything, torch.arange(len(test_labels))
        if len(parts) == 3:
            more_paths, more_labels = _list_same(names, parts[0], parts[2])
            train, validation = pool, len(labels) + torch.arange(len(more_labels))
            paths, labels = paths + more_paths, torch.cat([labels, more_labels])
        else:
            count = self.validation or max(len(pool) // 10, len(names))
            train, validation = hold_out(labels, pool, count, self.split_seed, "a validation set", names)
        check_headers(paths if test_paths is paths else paths + test_paths)
        shape = (3, self.image_size, self.image_size)
        split = Split(train, validation, test)
        workers = min(_cores(), 4) if self.workers is None else self.workers
        return FolderData(names, shape, labels, test_labels, split, paths, test_paths, workers)

    def digest(self, data_dir: Path | None) -> str | None:
        """See `DataSet.digest`; images that are mended or added make it another one."""
        if data_dir is None or not data_dir.is_dir():
            return None
        return digest_of(data_dir, [path for part in self._parts(data_dir) for path in list_images(part)[1]])

    def _parts(self, folder: Path) -> list[Path]:
        """Return the folders of training, test and (if it is used) validation images, or one that has them all."""
        train, others = folder / "train", [folder / name for name in self.testing if (folder / name).is_dir()]
        if train.is_dir() and others:
            return [train, *(others if self.validation is None else others[:1])]
        if train.is_dir() or others:
            has, lacks = ("train", " or ".join(self.testing)) if train.is_dir() else (others[0].name, "train")
            raise UserError(f"{folder} has {has} but no {lacks} beside it")
        return [folder]


@dataclass(frozen=True)
class ImageNet(ImageFolder):
    """ImageNet: DIR/train and DIR/val with a folder a class; the papers' crops and flips."""

    house: ClassVar[dict[str, Any]] = ImageFolder.house | {"batch_size": 256}
    testing: ClassVar[tuple[str, ...]] = ("val",)

    validation: int | None = setting(50000, "images held out of the training images, stratified")

    def digest(self, data_dir: Path | None) -> str | None:
        """See `DataSet.digest`: they are always the same."""
        return None

    def _parts(self, folder: Path) -> list[Path]:
        parts = super()._parts(folder)
        if len(parts) == 1:
            raise UserError(
                f"{folder} is not laid out as ImageNet; expected the folders train and val, each with a "
                "folder a class (for class folders alone: --dataset folder)"
            )
        return parts


def _cores() -> int:
    """Return how many cores this process may use; not all systems tell, and then how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _list_same(names: list[str], train: Path, other: Path) -> tuple[list[str], Tensor]:
    """Return the paths and labels of images beside the training images, which have to be of the same classes."""
    found, paths, labels = list_images(other)
    differing = sorted(set(names) ^ set(found))
    if differing:
        raise UserError(
            f"{train} has {len(names)} classes and {other} has {len(found)}; expected the same ones "
            f"(not in both: {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''})"
        )
    return paths, labels
