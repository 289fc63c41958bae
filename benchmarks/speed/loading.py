"""The fraction of training time that is spent on loading images."""

from __future__ import annotations

import time

import torch

from exitkit.benchmarks.speed.work import Work
from exitkit.data.base import TensorData
from exitkit.data.split import Split


def noise_images(work: Work, count: int) -> TensorData:
    """Return `count` noise images in the format of CIFAR: uint8 in memory, random crops and flips."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *work.shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(work.classes, (count,), generator=generator)
    indices = torch.arange(count)
    names = [str(number) for number in range(work.classes)]
    channels = work.shape[0]
    mean, std = (0.5,) * channels, (0.25,) * channels
    split = Split(indices, indices[:0], indices)
    return TensorData(names, work.shape, labels, labels, split, images, images, mean, std, padding=4)


def loading_share(work: Work, batches: int = 4) -> float:
    """Return the fraction of an epoch's time, 0..1, in which batches are prepared."""
    data, run = noise_images(work, work.batch * batches).on(torch.device(work.device)), work.run("joint")
    order = torch.arange(work.batch * batches).split(work.batch)
    waited, began, asked = 0.0, time.perf_counter(), time.perf_counter()
    for batch in data.batches("train", order, augment=True, seed=0):
        waited += time.perf_counter() - asked
        run.train_step(batch)
        asked = time.perf_counter()
    return waited / (time.perf_counter() - began)
