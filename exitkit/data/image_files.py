"""Images in files: listing a folder of class folders, and reading images as they are needed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from exitkit.data.base import Batch, Data, Part
from exitkit.data.torchvision_import import torchvision
from exitkit.engine.randomness import derive
from exitkit.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LOOKED_AT = 20_000  # images whose headers are looked at beforehand: a few seconds
_READ, _BYTES = 1_000, 65_536  # images whose beginnings tell a folder from another, and how much of each
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Listing = tuple[list[str], list[str], Tensor]
"""Class names, image paths and labels."""


def list_images(folder: Path) -> Listing:
    """List a folder's images: each subfolder is a class, and all images at any depth below it belong to it.

    What begins with a dot is passed over, be it a file or a folder: thumbnails and the like are no images.

    Raises:
        UserError: no subfolders, one without images, or a folder that can't be read.
    """
    try:
        classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from None
    if len(classes) < 2:
        raise UserError(f"{folder} has {len(classes)} class folders; expected at least 2, each with its images")
    paths: list[str] = []
    labels: list[int] = []
    for label, child in enumerate(classes):
        found = sorted(_images_below(child))
        if not found:
            raise UserError(f"class folder {child} holds no images; expected {', '.join(SUFFIXES[:3])}, ...")
        paths += found
        labels += [label] * len(found)
    return [child.name for child in classes], paths, torch.tensor(labels)


def _images_below(folder: Path) -> Iterator[str]:
    # os.walk and not rglob: it asks the disk nothing about single files, and ImageNet has 1.3 million.
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield f"{place}{os.sep}{name}"


def _refuse(error: OSError) -> None:
    # Without it, os.walk would pass over a folder that can't be read, and training take what is left.
    raise UserError(f"{error.filename} can't be read: {error.strerror}") from None


def digest_of(folder: Path, paths: Sequence[str]) -> str:
    """Return what tells the images of a folder from others: names below it and sizes of all, beginnings of a sample."""
    known = hashlib.sha256()
    try:
        for path in paths:
            fact = f"{os.path.relpath(path, folder)}\0{Path(path).stat().st_size}\0"
            known.update(fact.encode(errors="surrogateescape"))
        for path in _spread(paths, _READ):
            with Path(path).open("rb") as file:
                known.update(file.read(_BYTES))
    except OSError as error:
        _refuse(error)
    return known.hexdigest()[:16]


def _spread(paths: Sequence[str], most: int) -> Sequence[str]:
    """Return all paths, or so many of them at most, evenly spread."""
    return paths[:: max(1, -(-len(paths) // most))]


def check_headers(paths: Sequence[str]) -> None:
    """Look whether files are images at all, before anything is trained on them; of many, an even sample.

    What only reading them through would tell, comes out when they are read.

    Raises:
        UserError: one is not.
    """
    # Imported when used: only image files need Pillow.
    from PIL import Image

    for path in _spread(paths, _LOOKED_AT):
        try:
            with Image.open(path):
                pass
        except Exception as error:  # Pillow raises many kinds
            raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    # An OSError's own words would name the file a second time.
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"image {path} can't be read: {reason}")


def read_image(path: str) -> Any:
    """Open an image as RGB (grey and palette images are turned into it).

    Raises:
        UserError: it is damaged, no image, or has more than 8 bits a channel (Pillow would cut them off at 255).
    """
    # Imported when used: only image files need Pillow.
    from PIL import Image

    try:
        with Image.open(path) as file:
            mode = file.mode
            image = file.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a file that is not what it should be
        raise _unreadable(path, error) from None
    if mode.startswith(("I", "F")):
        raise UserError(f"image {path} has more than 8 bits a channel (mode {mode}); expected 8")
    return image


class _Images(Dataset[tuple[Tensor, int] | str]):
    """Reads, transforms and seeds one image at a time, in whichever worker it falls to.

    Of an image that can't be read it gives the error's words: an error that a worker raises comes wrapped in its
    traceback, and keeps the other workers from being shut down.
    """

    def __init__(self, paths: list[str], labels: Tensor, indices: Tensor, size: int, seed: int | None) -> None:
        self.paths, self.labels, self.indices = paths, labels, indices
        self.size, self.seed = size, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int] | str:
        index = int(self.indices[position])
        try:
            image, label = read_image(self.paths[index]), int(self.labels[index])
        except UserError as error:
            return str(error)
        transform = _transform(self.size, self.seed is not None)
        if self.seed is None:
            return transform(image), label
        # The transforms draw from the CPU's global generator; what it was is put back, and other devices' stay.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self.seed, position))
            return transform(image), label


def _together(items: list[tuple[Tensor, int] | str]) -> Any:
    """Make a batch of images and labels, or hand on the first error's words."""
    return next((item for item in items if isinstance(item, str)), None) or default_collate(items)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Block SIGINT until the end of the block, and for good in processes that start within it.

    Ctrl-C in a terminal reaches the workers too; where one dies of it, this process fails or waits instead of stopping.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _keep_quiet(worker: int) -> None:
    # What goes wrong in a worker is told by the process that it reads for. Only the thread that hands images over would
    # print anything: that nobody takes them any more, when that process is being stopped.
    sys.excepthook = lambda *error: None


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
            collate_fn=_together,
            worker_init_fn=_keep_quiet,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),  # else it would draw from the global one
        )
        with _interrupts_held_back():
            batches = iter(loader)  # starts the workers
        try:
            for batch in batches:
                if isinstance(batch, str):
                    raise UserError(batch)
                yield Batch(*batch)
        finally:
            del batches  # else an error's traceback keeps the workers
