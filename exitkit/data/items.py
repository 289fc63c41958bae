"""Map-style PyTorch data sets as images and labels: torchvision's, Hugging Face's, and any with `len()` and items."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from exitkit.data.decoding import TooManyBitsError, as_seen
from exitkit.data.lazy import seeded
from exitkit.errors import UserError

_SAMPLES = 64  # images of a part whose content enters the fingerprint
_IMAGE_KEYS = ("image", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels", "target")

Keys = tuple[int | str, int | str]
"""Where an item has its image and its label: places in a tuple, or names in a dictionary."""


class Sample(NamedTuple):
    """An item that was read to know the data set: its label, and a digest of its image."""

    place: int
    label: int
    digest: bytes


class Items:
    """The images and labels of one part.

    Args:
        items: a map-style data set; an item is a tuple or a dictionary.
        part: "train", "validation" or "test", for messages.
        keys: where an item has its image and its label; None: the first two places of a tuple, or the usual names.

    Attributes:
        final_shape: (channels, height, width) of images that are final inputs; None: images that are to be transformed.

    Raises:
        UserError: it has no length or no items, or an item has no image or no label.
    """

    def __init__(self, items: Any, part: str, keys: Keys | None = None) -> None:
        if not (hasattr(items, "__getitem__") and hasattr(items, "__len__")):
            raise UserError(f"the {part} data is a {type(items).__name__}; expected a data set with len() and items")
        if not len(items):
            raise UserError(f"the {part} data has no images")
        self.items, self.part = items, part
        with seeded(0):
            self.keys = keys or self._find_keys()
            first = self.image(0)
        final = isinstance(first, Tensor) and first.is_floating_point()
        self.final_shape = tuple(first.shape) if final else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        """See `exitkit.data.lazy.Source`."""
        return self.image(index)

    def image(self, index: int) -> Any:
        """Return an image: PIL (RGB) or a uint8 tensor [3, H, W]; or, if it is final, a float32 tensor [C, H, W].

        PIL images are converted as image files are; see `as_seen`.

        Raises:
            UserError: the data set raises an error, or gives something else.
        """
        image = self._item(index)[0]
        if hasattr(image, "convert"):
            try:
                return as_seen(image)
            except TooManyBitsError as error:
                raise self._fault(index, f"has an image that {error}") from None
            except Exception as error:  # Pillow decodes when it converts, and raises many types of error
                raise self._unreadable(index, error) from error
        tensor = image
        if isinstance(image, np.ndarray) and image.ndim == 3:
            try:
                tensor = torch.from_numpy(np.array(image)).movedim(-1, 0)  # a copy: arrays may be reversed or read-only
            except TypeError:  # torch has no such type
                raise self._fault(
                    index, f"has an image of {image.dtype}; expected uint8 with 1 or 3 channels, or float32"
                ) from None
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
            raise self._fault(
                index, f"has an image that is a {type(image).__name__}{shape}; expected PIL, or a tensor [C, H, W]"
            )
        if tensor.is_floating_point():
            return tensor.float()
        if tensor.dtype != torch.uint8 or len(tensor) not in (1, 3):
            raise self._fault(
                index,
                f"has an image of {tensor.dtype} and {len(tensor)} channels; expected uint8 with 1 or 3, or float32",
            )
        return tensor.expand(3, -1, -1)

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.items[index]
            return item[self.keys[0]], item[self.keys[1]]
        except Exception as error:  # a user's data set may raise any error
            raise self._unreadable(index, error) from error

    def _unreadable(self, index: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or "no message"
        return self._fault(index, f"can't be read ({type(error).__name__}: {reason})")

    def _fault(self, index: int, problem: str) -> UserError:
        return UserError(f"item {index} of the {self.part} data {problem}")

    def _find_keys(self) -> Keys:
        try:
            item = self.items[0]
        except Exception as error:  # a user's data set may raise any error
            raise self._unreadable(0, error) from error
        if isinstance(item, Mapping):
            found = [[key for key in usual if key in item] for usual in (_IMAGE_KEYS, _LABEL_KEYS)]
            if all(len(names) == 1 for names in found):
                return found[0][0], found[1][0]
            names = ", ".join(map(str, item))
            raise self._fault(0, f"has the names {names}; say which are image and label, by keys=(..., ...)")
        if isinstance(item, Sequence) and not isinstance(item, str) and len(item) > 1:
            return 0, 1
        raise self._fault(0, f"is a {type(item).__name__}; expected a tuple (image, label), or a dictionary")

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """Labels and digests of at most 64 evenly spaced items; random transforms draw the same numbers each time."""
        samples = []
        for index in range(0, len(self), max(1, -(-len(self) // _SAMPLES))):
            with seeded(index):
                image, label = self.image(index), self._item(index)[1]
            samples.append(Sample(index, self._number(index, label), _content(image)))
        return samples

    @functools.cached_property
    def labels(self) -> Tensor:
        """The labels, int64 [N]; they are looked up where the data set has them as a list, else all items are read."""
        known = _known_labels(self.items, self.keys[1])
        if (
            known is not None
            and len(known) == len(self)
            and all(int(known[sample.place]) == sample.label for sample in self.samples)
        ):
            return known
        with seeded(0):
            return torch.tensor([self._number(index, self._item(index)[1]) for index in range(len(self))])

    def _number(self, index: int, label: Any) -> int:
        try:
            number = int(label)
        except (TypeError, ValueError):
            raise self._fault(index, f"has the label {label!r}; expected an integer, from 0") from None
        if number < 0 or number != label:
            raise self._fault(index, f"has the label {label!r}; expected an integer, from 0")
        return number

    def augments(self) -> bool:
        """Whether the data set transforms its images at random."""
        contents = []
        for seed in range(4):
            with seeded(seed):
                contents.append(_content(self.image(0)))
        return len(set(contents)) > 1

    def class_names(self) -> list[str] | None:
        """Return the names that the data set has for its classes, if it has any."""
        return _known_names(self.items, self.keys[1])

    def update(self, digest: Any) -> None:
        """Add number, labels and sampled contents to a digest."""
        digest.update(f"{self.part}\0{len(self)}\0".encode())
        digest.update(self.labels.numpy().tobytes())
        for sample in self.samples:
            digest.update(sample.digest)


class Joined:
    """Several parts one after the other, as one source of images."""

    def __init__(self, parts: Sequence[Items]) -> None:
        self._parts = list(parts)
        self._starts = [0, *itertools.accumulate(map(len, self._parts))]

    def __getitem__(self, index: int) -> Any:
        """See `exitkit.data.lazy.Source`."""
        part = next(place for place, end in enumerate(self._starts[1:]) if index < end)
        return self._parts[part][index - self._starts[part]]


def _content(image: Any) -> bytes:
    """Return a digest of an image's type, size and pixels."""
    array = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).digest()


def _known_labels(items: Any, key: int | str) -> Tensor | None:
    """Return the labels of a data set that has them as a list, without reading images."""
    if isinstance(items, Subset):
        parent = _known_labels(items.dataset, key)
        return None if parent is None else parent[torch.as_tensor(items.indices)]
    if isinstance(items, ConcatDataset):
        parents = [_known_labels(part, key) for part in items.datasets]
        return None if any(part is None for part in parents) else torch.cat([p for p in parents if p is not None])
    if isinstance(items, TensorDataset):
        return _as_labels(items.tensors[int(key)])
    if hasattr(items, "column_names") and key in items.column_names:  # Hugging Face
        return _as_labels(items[key])
    return next((_as_labels(getattr(items, name)) for name in ("targets", "labels") if hasattr(items, name)), None)


def _as_labels(values: Any) -> Tensor | None:
    try:
        labels = torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError):
        return None
    return labels.long() if labels.dim() == 1 and not labels.is_floating_point() else None


def _known_names(items: Any, key: int | str) -> list[str] | None:
    if isinstance(items, Subset):
        return _known_names(items.dataset, key)
    if isinstance(items, ConcatDataset):
        return _known_names(items.datasets[0], key)
    features = getattr(items, "features", None)
    if isinstance(features, Mapping) and key in features:  # Hugging Face
        names = getattr(features[key], "names", None)
    else:
        names = getattr(items, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None
