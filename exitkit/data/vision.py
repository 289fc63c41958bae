"""Fashion-MNIST, CIFAR-10 and CIFAR-100: small images, kept in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from exitkit.data.base import Data, DataSet, TensorData
from exitkit.data.cifar_binary import find_binary, read_binary
from exitkit.data.split import Split, hold_out
from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError

DEFAULT_DIR = Path("data")


@dataclass(frozen=True)
class Small(DataSet):
    """A set of small images with an official test set.

    Class attributes:
        title: its name, for messages.
        torchvision_name: torchvision's class that downloads and reads it.
        mean, std: of each channel, as the papers have them.
        padding: of the papers' augmentation; 0: none.
        class_names: in the order of the labels.
    """

    title: ClassVar[str]
    torchvision_name: ClassVar[str]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    padding: ClassVar[int]
    classes: ClassVar[int]

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """See `DataSet.load`; without `data_dir` it is the folder `data` here."""
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
        reader = getattr(torchvision("datasets"), self.torchvision_name)
        try:
            found = reader(str(folder), train=train, download=False)
        except (RuntimeError, OSError, ValueError, EOFError) as missing:
            if not download:
                raise self._missing(folder, missing) from None
            try:
                found = reader(str(folder), train=train, download=True)
            except Exception as error:  # whatever the network, an archive or the disk throws
                raise self._missing(folder, error) from None
        images = torch.as_tensor(np.asarray(found.data))
        images = images.unsqueeze(1) if images.dim() == 3 else images.movedim(-1, 1).contiguous()
        return images, torch.as_tensor(np.asarray(found.targets)).long()

    def _missing(self, folder: Path, error: Exception) -> UserError:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        return UserError(
            f"{self.title} is not in {folder.resolve()} and can't be fetched ({reason}); "
            "say where it lies by --data-dir DIR"
        )


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


@dataclass(frozen=True)
class CIFAR(Small):
    """A CIFAR set, read from its official binary layout where that lies there, or through torchvision.

    Class attributes:
        binary: the folder of the binary layout, its training and test files.
    """

    padding: ClassVar[int] = 4
    binary: ClassVar[tuple[str, tuple[str, ...], tuple[str, ...]]]
    label_bytes: ClassVar[int]

    def _read(self, folder: Path, download: bool) -> list[tuple[Tensor, Tensor]]:
        layout = find_binary(folder, *self.binary)
        if layout is None:
            return super()._read(folder, download)
        return [read_binary(files, self.label_bytes, self.classes) for files in layout]


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
    label_bytes: ClassVar[int] = 1


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
    label_bytes: ClassVar[int] = 2
