"""Subsets of the images: few images per class, and long-tailed class frequencies."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from exitkit.data.base import Data
from exitkit.errors import UserError

AnyData = TypeVar("AnyData", bound=Data)


def thin(data: AnyData, per_class: int | None = None, imbalance: float = 1.0, thin_validation: bool = False) -> AnyData:
    """Return the data with fewer training images; test images are unchanged.

    Args:
        data: loaded images.
        per_class: number of training images to keep per class, the first ones (Meta-GF, table 5: 150 of CIFAR-100).
        imbalance: factor f between the most frequent and the rarest class; class c of C keeps the first
            floor(n_c f^(-c / (C - 1))) of its n_c images, the exponential profile of long-tailed CIFAR (Cui et al.,
            Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, section 5).
        thin_validation: of each class, also keep only the share of the validation images that `per_class` keeps of the
            training images, rounded, at least one.

    Raises:
        UserError: a class has fewer than `per_class` training images.
    """
    if per_class is None and imbalance == 1:
        return data
    labels = data.labels("train")
    kept = []
    for index in range(data.num_classes):
        members = data.split.train[labels == index]
        if per_class is not None and per_class > len(members):
            raise UserError(
                f"per_class is {per_class}, and class {data.class_names[index]} has {len(members)} training images "
                f"without those held out; expected at most {len(members)}"
            )
        count = len(members) if per_class is None else per_class
        share = imbalance ** (-index / max(data.num_classes - 1, 1))
        kept.append(members[: max(int(count * share + 1e-9), 1)])
    split = dataclasses.replace(data.split, train=torch.cat(kept).sort().values)
    if thin_validation and per_class is not None:
        split = dataclasses.replace(split, validation=_validation(data, per_class))
    return dataclasses.replace(data, split=split)


def _validation(data: Data, per_class: int) -> Tensor:
    """Return the validation images [n] that stay if `per_class` of the training images of each class stay."""
    sizes = torch.bincount(data.labels("train"), minlength=data.num_classes)
    labels = data.labels("validation")
    kept = []
    for index, size in enumerate(sizes.tolist()):
        members = data.split.validation[labels == index]
        kept.append(members[: max(round(len(members) * per_class / size), 1)])
    return torch.cat(kept).sort().values
