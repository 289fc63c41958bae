"""CIFAR's official binary layout: fixed-size records, which are read without unpickling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exitkit.errors import UserError

_PIXELS = 3 * 32 * 32


def find_binary(folder: Path, name: str, train: Sequence[str], test: Sequence[str]) -> list[list[Path]] | None:
    """Return the training and test files of the layout in `folder` or its subfolder `name`; None if there are none.

    Raises:
        UserError: some of the files exist and others are missing.
    """
    for place in (folder / name, folder):
        paths = [[place / file for file in files] for files in (train, test)]
        missing = [path for group in paths for path in group if not path.is_file()]
        if not missing:
            return paths
        if place.name == name and place.is_dir():
            names = ", ".join(path.name for path in missing)
            raise UserError(f"{place} lacks {names}; expected the whole binary release")
    return None


def read_binary(files: Sequence[Path], records: int, label_bytes: int, classes: int) -> tuple[Tensor, Tensor]:
    """Read files of `records` records: `label_bytes` label bytes (the last is the class), then 3 x 32 x 32 pixels.

    Returns:
        Images uint8 [N, 3, 32, 32] and labels int64 [N].

    Raises:
        UserError: a file can't be read, has a wrong size, or contains a label that is not a class.
    """
    size = label_bytes + _PIXELS
    images, labels = [], []
    for path in files:
        try:
            raw = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from None
        if len(raw) != records * size:
            raise UserError(f"{path} has {len(raw)} bytes; expected {records * size} ({records} records of {size})")
        table = raw.reshape(records, size)
        classes_read = table[:, label_bytes - 1]
        if classes_read.max() >= classes:
            raise UserError(f"{path} holds the label {classes_read.max()}; expected 0 to {classes - 1}")
        labels.append(classes_read.astype(np.int64))
        images.append(table[:, label_bytes:].reshape(-1, 3, 32, 32))
    return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))
