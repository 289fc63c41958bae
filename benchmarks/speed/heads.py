"""Time of training the heads of a frozen trunk: features computed once, against the trunk in every epoch."""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from exitkit.benchmarks.speed.loading import noise_images
from exitkit.benchmarks.speed.row import Row, judged
from exitkit.benchmarks.speed.timing import Ratio, median_interval
from exitkit.benchmarks.speed.work import Work
from exitkit.data.base import Data, DataSet
from exitkit.data.split import Split
from exitkit.errors import Note
from exitkit.plugins import register, setting
from exitkit.training.loop import train

LIMIT = 15
"""Smallest ratio of the two times, for 20 epochs."""


@dataclass(frozen=True)
class Noise(DataSet):
    """Noise images in memory, of 10 classes; a tenth is added as validation images, and a hundredth as test images."""

    images: int = setting(5000, "training images")
    size: int = setting(64, "height and width")

    def load(self, data_dir: Path | None, download: bool = True) -> Data:
        """Draw the images."""
        count = self.images + self.images // 10 + self.images // 100
        data = noise_images(Work(classes=10, shape=(3, self.size, self.size)), count)
        parts = torch.arange(count).split([self.images, self.images // 10, self.images // 100])
        return dataclasses.replace(data, split=Split(*parts), padding=0)


def heads_row(rounds: int = 1, images: int = 5000, epochs: int = 20, network: str = "torchvision:resnet18") -> Row:
    """Measure whole runs of `heads`, with their set-up and evaluation, with stored features and without.

    The time of `epochs` epochs without is extrapolated from runs of one and three epochs, which take turns with the run
    with stored features.
    """
    register("dataset", "noise", Noise)
    ratios, times = [], []
    for number in range(rounds):
        one = _seconds(number, 1, False, images, network)
        stored = _seconds(number, epochs, True, images, network)
        three = _seconds(number, 3, False, images, network)
        ratios.append((one + (epochs - 1) * (three - one) / 2) / stored)
        times.append(stored)
    ratio = Ratio(sorted(ratios)[rounds // 2], *median_interval(ratios), sorted(times)[rounds // 2])
    target = f"heads of {network}, {images} images, {epochs} epochs: the trunk in every epoch, in runs with features"
    return judged(target, LIMIT, ratio, at_least=True)


def _seconds(seed: int, epochs: int, cache: bool, images: int, network: str) -> float:
    """Return the seconds of a run."""
    recipe = {
        "method": "heads",
        "method_settings": {"cache": cache},
        "backbone": network,
        "dataset": "noise",
        "dataset_settings": {"images": images},
        "epochs": epochs,
        "batch_size": 64,
        "lr": 1e-3,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        began = time.perf_counter()
        train(recipe, out)
        return time.perf_counter() - began
