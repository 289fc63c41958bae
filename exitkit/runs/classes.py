"""Accuracy per class: recall, balanced accuracy, the most frequent class, and whether anything was learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exitkit.errors import UserError
from exitkit.runs.formats import read_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ClassHits:
    """Correct predictions per class of one part, for K exits and C classes.

    Attributes:
        images: int [C], number of images of each class.
        hits: int [K, C], how many of them each exit predicts correctly.
    """

    images: np.ndarray
    hits: np.ndarray

    @classmethod
    def count(cls, logits: np.ndarray, labels: np.ndarray) -> ClassHits:
        """Count from logits [N, K, C] and labels [N]."""
        classes = logits.shape[2]
        right = logits.argmax(axis=2) == labels[:, None]
        hits = [np.bincount(labels[column], minlength=classes) for column in right.T]
        return cls(np.bincount(labels, minlength=classes), np.stack(hits))

    @property
    def recall(self) -> np.ndarray:
        """[K, C]: share of the images of each class that each exit predicts correctly, in percent; NaN without any."""
        share: np.ndarray = 100 * self.hits / np.where(self.images > 0, self.images, np.nan)
        return share

    @property
    def balanced(self) -> np.ndarray:
        """[K]: balanced accuracy, the mean recall of the classes that have images, in percent."""
        mean: np.ndarray = self.recall[:, self.images > 0].mean(axis=1)
        return mean

    @property
    def most_frequent(self) -> int:
        """The class with most images."""
        return int(self.images.argmax())

    @property
    def majority(self) -> float:
        """Accuracy, in percent, of a network that always predicts the most frequent class."""
        return float(100 * self.images.max() / self.images.sum())

    @property
    def chance(self) -> float:
        """Balanced accuracy, in percent, of any prediction that ignores the image."""
        return float(100 / (self.images > 0).sum())

    @property
    def learned(self) -> np.ndarray:
        """[K]: whether each exit's balanced accuracy is above chance by more than two standard errors."""
        counts, share = self.images[self.images > 0], self.chance / 100
        error = 100 * np.sqrt((share * (1 - share) / counts).sum()) / len(counts)
        above: np.ndarray = self.balanced > self.chance + 2 * error
        return above


def class_table(parts: dict[str, ClassHits]) -> pd.DataFrame:
    """Return the rows of `classes.csv`: part, class (from 0), images, and hits_1 to hits_K."""
    # Imported when used: pandas takes half a second to load.
    import pandas as pd

    frames = []
    for part, counted in parts.items():
        columns: dict[str, Any] = {"part": part, "class": np.arange(len(counted.images)), "images": counted.images}
        columns |= {f"hits_{number}": hits for number, hits in enumerate(counted.hits, 1)}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def read_classes(path: Path, part: str, exits: int) -> ClassHits:
    """Read one part of `classes.csv`.

    Raises:
        UserError: the file is damaged.
    """
    names = [f"hits_{number}" for number in range(1, exits + 1)]
    table = read_table(path, ["part"], ["class", "images", *names])
    rows = table[table["part"] == part]
    counted = ClassHits(rows["images"].to_numpy(), rows[names].to_numpy().T)
    valid = len(rows) > 0 and rows["class"].tolist() == list(range(len(rows)))
    if not valid or (counted.hits < 0).any() or (counted.hits > counted.images).any() or counted.images.sum() < 1:
        raise UserError(f"{path} is damaged (expected the classes 0, 1, ... of {part}, with at most all images right)")
    return counted
