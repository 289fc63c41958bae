"""Folders of images with one subfolder per class: ImageNet, or the user's own images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from exitkit.data.base import Data
from exitkit.data.image_files import digest_of
from exitkit.data.images import ImageDataSet
from exitkit.data.listing import find_parts, list_parts, same_classes
from exitkit.errors import UserError
from exitkit.plugins import setting


@dataclass(frozen=True)
class ImageFolder(ImageDataSet):
    """Your own images: DIR/train and DIR/test (or val) with one folder per class, or class folders only.

    If DIR has train, val and test, val is the validation part, unless `validation` is set. If DIR has class folders
    only, a fifth of the images is drawn as the test part, stratified.
    """

    testing: ClassVar[tuple[str, ...]] = ("test", "val")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """List the images; see `DataSet.load`."""
        if data_dir is None:
            raise UserError("this data set is read from a folder of images; expected --data-dir DIR")
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is not a folder; expected a folder with one subfolder per class")
        parts = self._parts(data_dir)
        listings, passed_over = list_parts(data_dir, parts)
        same_classes(dict(zip(parts, listings, strict=True)))
        train, test, validation, *_ = [*listings, None, None]
        given = (listing.labels if listing else None for listing in (test, validation))
        labels = self.arranged(train.names, train.labels, *given)
        paths = train.paths + (validation.paths if validation else [])
        data = self.of_files(train.names, labels, paths, test.paths if test else paths)
        return dataclasses.replace(data, passed_over=passed_over.texts())

    def digest(self, data_dir: Path | None) -> str | None:
        """See `DataSet.digest`; it changes if images are repaired, added or removed."""
        if data_dir is None or not data_dir.is_dir():
            return None
        listings, _ = list_parts(data_dir, self._parts(data_dir))
        return digest_of(data_dir, [path for listing in listings for path in listing.paths])

    def _parts(self, folder: Path) -> list[Path]:
        """Return the folders of the training, test and (if used) validation images, or one folder that contains all."""
        parts = find_parts(folder)
        train, others = parts.get("train"), [parts[role] for role in self.testing if role in parts]
        if train and others:
            return [train, *(others if self.validation is None else others[:1])]
        if parts:
            has = next(iter(parts.values())).name
            lacks = " or ".join(self.testing) if train else "train"
            raise UserError(
                f"{folder} has the subfolder {has} but not {lacks}; expected both (if {has} is a class: the folders of "
                "all classes in the subfolders train and test)"
            )
        return [folder]


@dataclass(frozen=True)
class ImageNet(ImageFolder):
    """ImageNet: DIR/train and DIR/val with one folder per class; crops and flips as in the papers."""

    house: ClassVar[dict[str, Any]] = ImageFolder.house | {"batch_size": 256}
    testing: ClassVar[tuple[str, ...]] = ("val",)
    catalogued: ClassVar[tuple[int, int, int] | None] = (1_281_167, 50_000, 1000)

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
