"""Images that are byte-identical copies of training images, in the validation and test parts."""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

_SECONDS = 5.0


def describe_copies(train: Sequence[str], held_out: Sequence[str], seconds: float = _SECONDS) -> str:
    """Return how many files of the other parts have the bytes of a training image, with an example; "" for none.

    Only files of equal size are read; after `seconds`, the number is that of the files compared so far.

    Args:
        train: the training images.
        held_out: the validation and test images.
        seconds: limit of the time.
    """
    stop = time.perf_counter() + seconds
    sizes: tuple[dict[int, list[str]], ...] = defaultdict(list), defaultdict(list)
    for paths, by_size in zip((train, held_out), sizes, strict=True):
        for path in paths:
            by_size[_size(path)].append(path)
    pairs, complete = list[tuple[str, str]](), True
    for size in sorted(sizes[0].keys() & sizes[1].keys()):
        originals = {digest: path for path, digest in _digests(sizes[0][size], stop)}
        copied = [(path, originals[d]) for path, d in _digests(sizes[1][size], stop) if d in originals]
        pairs += copied
        complete = time.perf_counter() < stop
        if not complete:
            break
    if not pairs:
        return ""
    first = " = ".join("/".join(Path(name).parts[-3:]) for name in pairs[0])
    verb = "images are copies" if len(pairs) > 1 else "image is a copy"
    number = f"{'' if complete else 'at least '}{len(pairs):,}"
    return f"{number} validation or test {verb} of training images, byte for byte ({first})"


def _digests(paths: Sequence[str], stop: float) -> Iterator[tuple[str, str]]:
    """Yield files and the digests of their bytes, until the time `stop`."""
    for path in paths:
        if time.perf_counter() > stop:
            return
        yield path, _digest(path)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  many files: no Path objects
    except OSError:  # it has been deleted since it was checked; reading it will say so
        return -1


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  many files: no Path objects
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError:
        return path
