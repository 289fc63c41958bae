"""Images that are read one by one when a batch needs them, by worker processes."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from exitkit.data.base import PARTS, Batch, Data, Part
from exitkit.data.copies import describe_copies
from exitkit.data.decoding import check_files
from exitkit.data.image_files import ImageFiles
from exitkit.data.inventory import Inventory
from exitkit.data.preprocessing import Preprocessing
from exitkit.data.torchvision_import import torchvision
from exitkit.engine.randomness import derive
from exitkit.errors import UserError


class Source(Protocol):
    """Images by index."""

    def __getitem__(self, index: int) -> Any:
        """Return an image: PIL (RGB) or a uint8 tensor [3, H, W]; or the final input, a float32 tensor [C, H, W].

        Raises:
            UserError: the image can't be read.
        """


@dataclass(frozen=True)
class LazyData(Data):
    """Images that are read on demand.

    Attributes:
        train_source, test_source: the images that the indices refer to.
        preprocessing: transform of PIL images and uint8 tensors; None: the sources give final tensors.
        workers: number of processes that read images; 0: the main process reads them.
        pinned: whether batches are in page-locked memory, from which they are copied to a GPU faster.
    """

    train_source: Source
    test_source: Source
    preprocessing: Preprocessing | None
    workers: int = 0
    pinned: bool = False

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel that is subtracted, of pixel values scaled to 0..1."""
        return self.preprocessing.mean if self.preprocessing else (0.0,) * self.input_shape[0]

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, by which it is divided."""
        return self.preprocessing.std if self.preprocessing else (1.0,) * self.input_shape[0]

    def paths(self, part: Part) -> list[str]:
        """Return the files of a part, in the order of its positions; [] if its images are not files."""
        source = self.test_source if part == "test" else self.train_source
        indices = getattr(self.split, part).tolist()
        return [source.paths[index] for index in indices] if isinstance(source, ImageFiles) else []

    def check(self) -> str:
        """Check that the files of all parts can be read, and look for copies; see `check_files`, `describe_copies`."""
        train, *held_out = (self.paths(part) for part in PARTS)
        others = [path for part in held_out for path in part]
        if not train + others:
            return ""
        found = check_files(train + others, self.workers), describe_copies(train, others)
        return "; ".join(filter(None, found))

    def inventory(self, root: Path) -> Inventory | None:
        """See `Data.inventory`."""
        train, test = self.train_source, self.test_source
        if not isinstance(train, ImageFiles) or not isinstance(test, ImageFiles):
            return None
        return Inventory.of(root, train.paths, test.paths, (self.train_labels, self.test_labels), self.split)

    def on(self, device: torch.device) -> Self:
        """Return the same images, whose batches are copied to `device` fast."""
        return replace(self, pinned=device.type == "cuda")

    def batches(self, part: Part, positions: Sequence[Tensor], *, augment: bool, seed: int) -> Iterator[Batch]:
        """See `Data.batches`.

        Raises:
            UnreadableImages: images of a batch can't be read.
        """
        testing = part == "test"
        images = _Images(
            self.test_source if testing else self.train_source,
            self.test_labels if testing else self.train_labels,
            getattr(self.split, part),
            self.preprocessing,
            augment,
            seed,
        )
        torchvision("transforms.v2")  # imported (and worked around) here once, not in every worker
        loader = DataLoader(
            images,
            batch_sampler=[batch.tolist() for batch in positions],
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_silence_worker,
            pin_memory=self.pinned,
            generator=torch.Generator().manual_seed(seed),  # otherwise it would use the global generator
        )
        with _interrupts_blocked():
            batches = iter(loader)  # starts the workers
        try:
            for batch in batches:
                if isinstance(batch, str):
                    raise UserError(batch)
                if isinstance(batch, _Faults):
                    raise UnreadableImages(batch.messages)
                yield Batch(*batch)
        finally:
            del batches  # otherwise an error's traceback keeps the workers alive


class UnreadableImages(UserError):
    """Images of a batch can't be read.

    Attributes:
        messages: {position within the part: message}.
    """

    def __init__(self, messages: Mapping[int, str]) -> None:
        super().__init__(next(iter(messages.values())))
        self.messages = dict(messages)


class _Faults(NamedTuple):
    """{position within the part: message} of images that can't be read."""

    messages: dict[int, str]


class _Images(Dataset[tuple[Tensor, int] | _Faults]):
    """Reads and transforms one image at a time, in any worker, with random numbers seeded per image.

    For an image that can't be read it returns the message: an error raised in a worker is wrapped in the worker's
    traceback, and prevents the shutdown of the other workers.
    """

    def __init__(
        self,
        source: Source,
        labels: Tensor,
        indices: Tensor,
        preprocessing: Preprocessing | None,
        augment: bool,
        seed: int,
    ) -> None:
        self.source, self.labels, self.indices = source, labels, indices
        self.preprocessing, self.augment, self.seed = preprocessing, augment, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int] | _Faults:
        index = int(self.indices[position])
        with seeded(derive(self.seed, position)):
            try:
                image = self.source[index]
            except UserError as error:
                return _Faults({position: str(error)})
            if self.preprocessing is not None:
                image = self.preprocessing(image, self.augment)
            return image, int(self.labels[index])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, NumPy and Python in this block; their states are restored at its end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _collate(items: list[tuple[Tensor, int] | _Faults]) -> Any:
    """Return a batch of images and labels, or the faults of its images, or another error message."""
    faults: dict[int, str] = {}
    images = []
    for item in items:
        if isinstance(item, _Faults):
            faults |= item.messages
        else:
            images.append(item[0])
    if faults:
        return _Faults(faults)
    sizes = sorted({"x".join(map(str, image.shape)) for image in images})
    if len(sizes) > 1:
        return f"a batch has images of {' and '.join(sizes[:2])}; expected tensors of one size"
    return default_collate(items)


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
    warnings.simplefilter("ignore")  # those of libraries about single images
