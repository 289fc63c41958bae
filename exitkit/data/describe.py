"""Description of images in a few lines, shown before training."""

from __future__ import annotations

import torch

from exitkit.data.base import Data, DataSet

_NAMED = 6  # largest number of classes that are all named


def describe(data: Data) -> list[str]:
    """Return lines about the classes, the parts, and what was passed over.

    Example: `3 classes: ant, bee, cow; 4 (ant) to 40 (cow) training images per class`.
    """
    sizes = torch.bincount(data.labels("train"), minlength=data.num_classes)
    names = data.class_names
    listed = names if len(names) <= _NAMED else [*names[:2], "...", names[-1]]
    least, most = int(sizes.argmin()), int(sizes.argmax())
    if sizes[least] == sizes[most]:
        per_class = f"{sizes[least]:,} training images per class"
    else:
        per_class = f"{sizes[least]:,} ({names[least]}) to {sizes[most]:,} ({names[most]}) training images per class"
    counts = {part: f"{len(data.labels(part)):,}" for part in ("train", "validation", "test")}
    lines = [
        f"{len(names):,} classes: {', '.join(listed)}; {per_class}",
        f"{counts['train']} training, {counts['validation']} validation and {counts['test']} test images",
    ]
    return lines + ([f"passed over: {'; '.join(data.passed_over)}"] if data.passed_over else [])


def describe_catalogued(dataset: DataSet) -> list[str]:
    """Return a line about the classes and the parts of a data set with its settings, without reading any image.

    The numbers of thinned parts are exact if all classes have equally many images.
    """
    if dataset.catalogued is None or dataset.validation is None:
        return ["the numbers of its classes and images are known when they are read, without --no-data"]
    pool, test, classes = dataset.catalogued
    validation = dataset.validation
    per_class = (pool - validation) / classes
    kept = per_class if dataset.per_class is None else dataset.per_class
    if dataset.thin_validation:
        validation = max(round(validation * kept / per_class), classes)
    shares = (dataset.imbalance ** (-index / max(classes - 1, 1)) for index in range(classes))
    thinned = dataset.per_class is not None or dataset.imbalance > 1
    train = sum(max(int(kept * share + 1e-9), 1) for share in shares) if thinned else pool - validation
    counts = f"{train:,} training, {validation:,} validation and {test:,} test images"
    return [f"{classes:,} classes; {counts}, as catalogued (nothing was read)"]
