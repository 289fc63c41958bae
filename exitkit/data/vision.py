"""Fashion-MNIST, CIFAR-10 and CIFAR-100: small images, kept in memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from exitkit.data.base import Data, DataSet, TensorData
from exitkit.data.cifar_binary import find_binary, read_binary
from exitkit.data.split import Split, hold_out
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError
from exitkit.files import acquire

DEFAULT_DIR = Path("data")


@dataclass(frozen=True)
class Small(DataSet):
    """A set of small images with an official test set.

    Class attributes:
        title: name of the data set in messages.
        torchvision_name: torchvision's class that downloads and reads it.
        mean, std: per channel, of pixel values scaled to 0..1, as in the papers.
        padding: pixels of padding in the papers' augmentation; 0: no augmentation.
        classes: number of classes; their names are their numbers.
        layouts: subfolders that may contain the files, for messages.
    """

    title: ClassVar[str]
    torchvision_name: ClassVar[str]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    padding: ClassVar[int]
    classes: ClassVar[int]
    layouts: ClassVar[str]

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """See `DataSet.load`; the default of `data_dir` is `data` in the current folder."""
        folder = data_dir or DEFAULT_DIR
        (train_images, train_labels), (test_images, test_labels) = self._read(folder, download)
        pool = torch.arange(len(train_labels))
        train, validation = hold_out(
            train_labels, pool, self.validation, self.split_seed, f"a validation set of {self.title}"
        )
        channels, height, width = train_images.shape[1:]
        return TensorData(
            [str(name) for name in range(self.classes)],
            (channels, height, width),
            train_labels,
            test_labels,
            Split(train, validation, torch.arange(len(test_labels))),
            train_images,
            test_images,
            self.mean,
            self.std,
            self.padding,
        )

    def _read(self, folder: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
        """Return (images uint8 [N, C, H, W], labels int64 [N]) for training and test."""
        return [self._read_with_torchvision(folder, train, download) for train in (True, False)]

    def _read_with_torchvision(self, folder: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        reader = functools.partial(getattr(torchvision("datasets"), self.torchvision_name), str(folder), train=train)
        try:
            try:
                dataset = reader()
            except Exception:  # missing, not the official files, or incomplete while another process downloads them
                if not download:
                    raise
                with _download_lock(folder):
                    dataset = reader(download=True)
            images = torch.as_tensor(np.asarray(dataset.data))
            labels = torch.as_tensor(np.asarray(dataset.targets)).long()
            if len(images) != len(labels):
                raise ValueError(f"{len(images)} images and {len(labels)} labels")
        except Exception as error:  # torchvision, network, archive and disk raise many types of error
            raise self._unreadable(folder, error, download) from None
        return (images.unsqueeze(1) if images.dim() == 3 else images.movedim(-1, 1).contiguous()), labels

    def _unreadable(self, folder: Path, error: Exception, download: bool) -> UserError:
        # In one line, and without torchvision's advice, which is meant for its callers.
        reason = " ".join(str(error).split()).partition(". You can use download")[0] or type(error).__name__
        return UserError(
            f"{self.title} can't be read from {folder.resolve()}{' or downloaded' if download else ''} "
            f"(looked for {self.layouts}: {reason.rstrip('.')}); pass the folder of "
            "its files with --data-dir DIR, or delete damaged files there"
        )


@contextlib.contextmanager
def _download_lock(folder: Path) -> Iterator[None]:
    """Let one of several ranks and runs download to a folder while the others wait; remove empty folders on failure."""
    created, path = False, folder / ".download.lock"
    lock = FileLock(path)
    while True:
        created |= not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        # If the download of another process failed, that process may have removed the folder and this lock file.
        with contextlib.suppress(FileNotFoundError):
            acquire(lock)
            if path.exists():
                break
            lock.release()
    try:
        yield
    except Exception:
        if created:
            with contextlib.suppress(OSError):
                path.unlink()
            for place in [*sorted(folder.rglob("*/"), reverse=True), folder]:  # subfolders first
                with contextlib.suppress(OSError):  # it contains files
                    place.rmdir()
        raise
    finally:
        lock.release()


@dataclass(frozen=True)
class FashionMNIST(Small):
    """Fashion-MNIST: 70,000 grey images of 28x28, 10 classes; no augmentation."""

    house: ClassVar[dict[str, Any]] = DataSet.house | {"backbone": "msdnet-cifar-lg5", "epochs": 60}
    title: ClassVar[str] = "Fashion-MNIST"
    torchvision_name: ClassVar[str] = "FashionMNIST"
    mean: ClassVar[tuple[float, ...]] = (0.2860,)
    std: ClassVar[tuple[float, ...]] = (0.3530,)
    padding: ClassVar[int] = 0
    classes: ClassVar[int] = 10
    catalogued: ClassVar[tuple[int, int, int] | None] = (60_000, 10_000, 10)
    layouts: ClassVar[str] = "FashionMNIST/raw"


@dataclass(frozen=True)
class CIFAR(Small):
    """A CIFAR data set, read from its official binary layout if that exists, otherwise through torchvision.

    Class attributes:
        binary: folder, training files and test files of the binary layout.
        records: number of images per training file and per test file of that layout.
        label_bytes: number of label bytes before each image; the last is the class.
    """

    padding: ClassVar[int] = 4
    binary: ClassVar[tuple[str, tuple[str, ...], tuple[str, ...]]]
    records: ClassVar[tuple[int, int]]
    label_bytes: ClassVar[int]

    def _read(self, folder: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
        layout = find_binary(folder, *self.binary)
        if layout is None:
            return super()._read(folder, download)
        return [
            read_binary(files, records, self.label_bytes, self.classes)
            for files, records in zip(layout, self.records, strict=True)
        ]


@dataclass(frozen=True)
class CIFAR10(CIFAR):
    """CIFAR-10: 60,000 colour images of 32x32, 10 classes; random crops and flips."""

    title: ClassVar[str] = "CIFAR-10"
    torchvision_name: ClassVar[str] = "CIFAR10"
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4824, 0.4467)
    std: ClassVar[tuple[float, ...]] = (0.2471, 0.2435, 0.2616)
    classes: ClassVar[int] = 10
    binary: ClassVar[tuple[str, tuple[str, ...], tuple[str, ...]]] = (
        "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        ("test_batch.bin",),
    )
    records: ClassVar[tuple[int, int]] = (10000, 10000)
    label_bytes: ClassVar[int] = 1
    catalogued: ClassVar[tuple[int, int, int] | None] = (50_000, 10_000, 10)
    layouts: ClassVar[str] = "cifar-10-batches-bin or cifar-10-batches-py"


@dataclass(frozen=True)
class CIFAR100(CIFAR):
    """CIFAR-100: 60,000 colour images of 32x32, 100 classes; random crops and flips."""

    title: ClassVar[str] = "CIFAR-100"
    torchvision_name: ClassVar[str] = "CIFAR100"
    mean: ClassVar[tuple[float, ...]] = (0.5071, 0.4867, 0.4408)
    std: ClassVar[tuple[float, ...]] = (0.2675, 0.2565, 0.2761)
    classes: ClassVar[int] = 100
    binary: ClassVar[tuple[str, tuple[str, ...], tuple[str, ...]]] = (
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
    )
    records: ClassVar[tuple[int, int]] = (50000, 10000)
    label_bytes: ClassVar[int] = 2
    catalogued: ClassVar[tuple[int, int, int] | None] = (50_000, 10_000, 100)
    layouts: ClassVar[str] = "cifar-100-binary or cifar-100-python"
