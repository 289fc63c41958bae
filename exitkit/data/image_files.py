"""Image files: listing of class folders, and reading of images on demand."""

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
_MAX_HEADERS = 20_000  # images whose headers are checked before training: a few seconds
_MAX_SAMPLES, _SAMPLE_BYTES = 1_000, 65_536  # images whose first bytes enter a folder's digest, and their number
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Listing = tuple[list[str], list[str], Tensor]
"""Class names, and the path and label (int64 [N]) of each image."""


def list_images(folder: Path) -> Listing:
    """List the images of a folder; each subfolder is a class, and contains its images at any depth.

    Files and folders whose name begins with a dot, such as thumbnails, are ignored.

    Raises:
        UserError: there are fewer than two subfolders, one has no images, or a folder can't be read.
    """
    try:
        classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} can't be read: {error.strerror}") from None
    if len(classes) < 2:
        raise UserError(f"{folder} has {len(classes)} class folders; expected at least 2, one per class")
    paths: list[str] = []
    labels: list[int] = []
    for label, child in enumerate(classes):
        images = sorted(_images_below(child))
        if not images:
            raise UserError(f"class folder {child} holds no images; expected {', '.join(SUFFIXES[:3])}, ...")
        paths += images
        labels += [label] * len(images)
    return [child.name for child in classes], paths, torch.tensor(labels)


def _images_below(folder: Path) -> Iterator[str]:
    # os.walk, not rglob: it makes no system call per file, and ImageNet has 1.3 million files.
    for place, folders, files in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield f"{place}{os.sep}{name}"


def _raise_unreadable(error: OSError) -> None:
    # By default os.walk skips a folder that can't be read, and training would use the remaining images.
    raise UserError(f"{error.filename} can't be read: {error.strerror}") from None


def digest_of(folder: Path, paths: Sequence[str]) -> str:
    """Return a digest of images: relative paths and sizes of all files, and the first bytes of a sample."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            fact = f"{os.path.relpath(path, folder)}\0{Path(path).stat().st_size}\0"
            digest.update(fact.encode(errors="surrogateescape"))
        for path in _sample(paths, _MAX_SAMPLES):
            with Path(path).open("rb") as file:
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        _raise_unreadable(error)
    return digest.hexdigest()[:16]


def _sample(paths: Sequence[str], limit: int) -> Sequence[str]:
    """Return at most `limit` of the paths, evenly spaced."""
    return paths[:: max(1, -(-len(paths) // limit))]


def check_headers(paths: Sequence[str]) -> None:
    """Check before training that files are images; of more than 20,000 files, an even sample is checked.

    Only headers are read; damaged pixel data is reported when an image is read.

    Raises:
        UserError: a file is not an image.
    """
    # Imported when used: only image files need Pillow.
    from PIL import Image

    for path in _sample(paths, _MAX_HEADERS):
        try:
            with Image.open(path):
                pass
        except Exception as error:  # Pillow raises many types of error
            raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> UserError:
    # The message of an OSError would name the file a second time.
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"image {path} can't be read: {reason}")


def read_image(path: str) -> Any:
    """Read an image as RGB (grey and palette images are converted).

    Raises:
        UserError: the file is damaged, is not an image, or has more than 8 bits per channel, which Pillow would clip.
    """
    # Imported when used: only image files need Pillow.
    from PIL import Image

    try:
        with Image.open(path) as file:
            mode = file.mode
            image = file.convert("RGB")
    except Exception as error:  # Pillow raises many types of error for invalid files
        raise _unreadable(path, error) from None
    if mode.startswith(("I", "F")):
        raise UserError(f"image {path} has more than 8 bits per channel (mode {mode}); expected 8")
    return image


class _Images(Dataset[tuple[Tensor, int] | str]):
    """Reads and transforms one image at a time, in any worker, with random numbers seeded per image.

    For an image that can't be read it returns the error message: an error raised in a worker is wrapped in the
    worker's traceback, and prevents the shutdown of the other workers.
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
        # The transforms use the CPU's global generator; its state is restored, and other devices are not affected.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(self.seed, position))
            return transform(image), label


def _collate(items: list[tuple[Tensor, int] | str]) -> Any:
    """Return a batch of images and labels, or the first error message."""
    return next((item for item in items if isinstance(item, str)), None) or default_collate(items)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this block, and permanently in processes that are started in it.

    Ctrl-C in a terminal is sent to the workers, too; if it ended one, this process would fail or wait instead of stop.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _silence_worker(worker: int) -> None:
    # The main process reports the errors of its workers. While it is being stopped, only a worker's thread that sends
    # images would print an error: that its queue is closed.
    sys.excepthook = lambda *error: None


def _transform(size: int, augment: bool) -> Any:
    """Return the papers' transform of a PIL image to float32 [3, size, size]."""
    v2 = torchvision("transforms.v2")
    if augment:
        shape = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    else:
        shape = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([*shape, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


@dataclass(frozen=True)
class FolderData(Data):
    """Images that are read from files on demand.

    Attributes:
        train_paths, test_paths: the files that the indices refer to.
        workers: number of processes that read images; 0: the main process reads them.
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
        torchvision("transforms.v2")  # imported (and worked around) here once, not in every worker
        loader = DataLoader(
            images,
            batch_sampler=[batch.tolist() for batch in positions],
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_silence_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),  # otherwise it would use the global generator
        )
        with _interrupts_blocked():
            batches = iter(loader)  # starts the workers
        try:
            for batch in batches:
                if isinstance(batch, str):
                    raise UserError(batch)
                yield Batch(*batch)
        finally:
            del batches  # otherwise an error's traceback keeps the workers alive
