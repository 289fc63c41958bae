"""Fewer training images: few labels, and long tails."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch

from exitkit.data.base import Data
from exitkit.errors import UserError

AnyData = TypeVar("AnyData", bound=Data)


def thin(data: AnyData, per_class: int | None = None, imbalance: float = 1.0) -> AnyData:
    """Leave out training images; what is held out and the test images stay as they are.

    Args:
        data: loaded images.
        per_class: keep the first so many training images of each class (Meta-GF, table 5: 150 of CIFAR-100).
        imbalance: factor f between the most frequent and the rarest class; class c of C keeps the first
            floor(n_c f^(-c / (C - 1))) of its n_c images, the exponential profile of long-tailed CIFAR (Cui et al.,
            Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, section 5).

    Raises:
        UserError: a class has fewer images than `per_class` asks for.
    """
    if per_class is None and imbalance == 1:
        return data
    labels = data.labels("train")
    kept = []
    for index in range(data.num_classes):
        mine = data.split.train[labels == index]
        if per_class is not None and per_class > len(mine):
            raise UserError(
                f"per_class is {per_class}, and class {data.class_names[index]} has {len(mine)} training images "
                "beside those held out; expected at most as many"
            )
        count = len(mine) if per_class is None else per_class
        share = imbalance ** (-index / max(data.num_classes - 1, 1))
        kept.append(mine[: max(int(count * share + 1e-9), 1)])
    split = dataclasses.replace(data.split, train=torch.cat(kept).sort().values)
    return dataclasses.replace(data, split=split)
