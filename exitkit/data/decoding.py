"""Reading of image files as people see them, and their check before training."""

from __future__ import annotations

import contextlib
import os
import random
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from exitkit.errors import UserError
from exitkit.escaping import counted

_SECONDS = 20.0  # time for decoding before training, and again for the headers of the files that are left
_NAMED = 3  # files that one message names
_whole: set[tuple[str, int, int]] = set()  # files decoded in this process: a worker trains many runs on them


class UnreadableImage(UserError):
    """An image file that is missing or damaged, or that can't be read for another reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"image {path} {reason}")


class TooManyBitsError(UserError):
    """An image with more than 8 bits per channel, which Pillow would clip."""


def read_image(path: str) -> Any:
    """Read an image as RGB, as people see it.

    The orientation of a photograph (EXIF) is applied, transparent pixels are white, and grey and palette images are
    converted. Of an animation, it is the first image.

    Returns:
        a PIL image.

    Raises:
        UnreadableImage: the file is missing or damaged, is not an image, is too large for Pillow, or has more than 8
            bits per channel, which Pillow would clip.
    """
    with warnings.catch_warnings(action="ignore"):  # Pillow's, about oddities of the file
        return _decode(path)


def _decode(path: str) -> Any:
    # Imported when used: only image files need Pillow.
    from PIL import Image

    try:
        with Image.open(path) as file:
            return as_seen(file)
    except TooManyBitsError as error:
        raise UnreadableImage(path, str(error)) from None
    except Exception as error:  # Pillow raises many types of error for invalid files
        raise UnreadableImage(path, _reason(error)) from None


def as_seen(image: Any) -> Any:
    """Return a PIL image as RGB, as people see it; see `read_image`.

    Raises:
        TooManyBitsError: it has more than 8 bits per channel.
    """
    # Imported when used: only images of Pillow need it.
    from PIL import ExifTags, Image, ImageOps

    image.load()
    if image.mode.startswith(("I", "F")):
        raise TooManyBitsError(f"has more than 8 bits per channel (mode {image.mode}); expected 8")
    with contextlib.suppress(Exception):  # damaged EXIF data: viewers ignore it
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque


def _reason(error: Exception) -> str:
    # Imported when used: only image files need Pillow.
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return f"has more than {limit:.0f} million pixels; scale it down"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, UnidentifiedImageError):
        return "can't be read: it is not an image, or of a format that this version of Pillow does not read"
    # The message of an OSError would name the file a second time.
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return f"can't be read: {reason}"


def check_files(paths: Sequence[str], threads: int, seconds: float = _SECONDS) -> str:
    """Check that image files can be read, and return what was checked, as text.

    All files are decoded, in random order, for as long as `seconds`; of the files that are left, the headers are read,
    again for as long as `seconds`.

    Args:
        paths: the files.
        threads: files that are decoded at once.
        seconds: limit of each of the two times.

    Raises:
        UserError: files can't be read; the message names the first ones.
    """
    began = time.perf_counter()
    order = random.Random(0).sample(paths, len(paths))
    with ThreadPoolExecutor(max(threads, 1)) as pool, warnings.catch_warnings(action="ignore"):
        decoded = _checked(pool, _decoding_fault, order, seconds)
        headers = _checked(pool, _header_fault, order[decoded:], seconds)
    took = f"in {time.perf_counter() - began:.1f} s"
    if decoded == len(paths):
        return f"{counted(decoded, 'image')} checked {took}"
    rest = "the headers of all others" if decoded + headers == len(paths) else f"the headers of {headers:,} others"
    return f"a sample of {decoded:,} of {len(paths):,} images and {rest} checked {took}"


def _checked(pool: ThreadPoolExecutor, fault: Any, paths: Sequence[str], seconds: float) -> int:
    """Apply `fault` to files until the time is over, and return their number."""
    began, count, faults = time.perf_counter(), 0, list[str]()
    for start in range(0, len(paths), 64):
        chunk = paths[start : start + 64]
        faults += filter(None, pool.map(fault, chunk))
        count += len(chunk)
        if time.perf_counter() - began > seconds:
            break
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError("; ".join(sorted(faults)[:_NAMED]) + more)
    return count


def _decoding_fault(path: str) -> str | None:
    """Return why a file can't be decoded, or None."""
    try:
        about = os.stat(path)  # noqa: PTH116  many files: no Path objects
        key = (path, about.st_mtime_ns, about.st_size)
        if key not in _whole:
            _decode(path)
            _whole.add(key)
    except UnreadableImage as error:
        return str(error)
    except OSError as error:
        return str(UnreadableImage(path, _reason(error)))
    return None


def _header_fault(path: str) -> str | None:
    """Return why the header of a file can't be read, or None."""
    # Imported when used: only image files need Pillow.
    from PIL import Image

    try:
        with Image.open(path):
            return None
    except Exception as error:  # Pillow raises many types of error for invalid files
        return str(UnreadableImage(path, _reason(error)))
