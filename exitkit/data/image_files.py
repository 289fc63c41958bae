"""Image files as a source of images, and their digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exitkit.data.decoding import read_image
from exitkit.data.listing import unreadable_folder

_MAX_SAMPLES, _SAMPLE_BYTES = 1_000, 65_536  # images whose first bytes enter a folder's digest, and their number


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
        raise unreadable_folder(error) from None
    return digest.hexdigest()[:16]


def _sample(paths: Sequence[str], limit: int) -> Sequence[str]:
    """Return at most `limit` of the paths, evenly spaced."""
    return paths[:: max(1, -(-len(paths) // limit))]


@dataclass(frozen=True)
class ImageFiles:
    """Image files as a source of images (see `exitkit.data.lazy.Source`).

    Attributes:
        paths: one path per image.
    """

    paths: list[str]

    def __getitem__(self, index: int) -> Any:
        """Read an image; see `read_image`."""
        return read_image(self.paths[index])
