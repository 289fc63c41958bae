"""Speed targets on a GPU, where kernel launches rather than arithmetic limit the speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, Dataset

from exitkit.benchmarks.speed.loading import noise_images
from exitkit.benchmarks.speed.row import Row, judged, not_run
from exitkit.benchmarks.speed.timing import paired_ratios
from exitkit.benchmarks.speed.work import Work
from exitkit.data.augment import crops_and_flips
from exitkit.data.base import TensorData
from exitkit.engine.devices import process_settings
from exitkit.networks.compilation import compile_parts

_BATCH, _BATCHES, _WORKERS = 64, 50, 4


def gpu_rows(work: Work) -> Iterator[Row]:
    """Measure both targets of training on a GPU; without a GPU, they are not run."""
    small = replace(work, batch=_BATCH, device="cuda")
    exits = work.build().num_exits
    faster = "cuda: images a second, in those of eager training from a worker-fed loader at batch 64"
    metagf = "cuda: an epoch of metagf, branches side by side at batch 64, in eager joint epochs"
    deterministic = "cuda: a deterministic step, in steps of the fastest kernels, bf16 at batch 64"
    if not torch.cuda.is_available():
        yield not_run(faster, 5.0)
        yield not_run(metagf, exits / 2)
        yield not_run(deterministic, 1.25)
        return
    ours = prepared(small)

    def configured() -> None:  # the papers' code has torch's own settings
        with process_settings(torch.device("cuda")):
            ours()

    yield judged(faster, 5.0, paired_ratios(eager(small), configured, small.rounds), at_least=True)
    with process_settings(torch.device("cuda")):
        branches = small.epoch("metagf", _BATCHES, branches="side-by-side")
        ratio = paired_ratios(branches, small.epoch("joint", _BATCHES), small.rounds)
    yield judged(metagf, exits / 2, ratio)
    fixed, fastest = with_settings(small, deterministic=True), with_settings(small, deterministic=False)
    yield judged(deterministic, 1.25, paired_ratios(fixed, fastest, small.rounds))


def with_settings(work: Work, *, deterministic: bool) -> Callable[[], None]:
    """Return a function that makes a joint step in bf16 with deterministic or with the fastest kernels."""
    step = work.step("joint", precision="bf16")

    def configured() -> None:
        with process_settings(torch.device(work.device), deterministic=deterministic):
            step()

    return configured


def prepared(work: Work) -> Callable[[], None]:
    """Return a function that trains an epoch as exitkit does: images on the device, channels last, bf16, compiled."""
    run = work.run("joint", precision="bf16")
    compile_parts(run.network)
    data = noise_images(work, work.batch * _BATCHES).on(torch.device(work.device))

    def epoch() -> None:
        order = torch.randperm(work.batch * _BATCHES).split(work.batch)
        for batch in data.batches("train", order, augment=True, seed=0):
            run.train_step(batch)

    return epoch


def eager(work: Work) -> Callable[[], None]:
    """Return a function that trains an epoch as the papers' code: workers augment image by image, eager fp32."""
    dataset = _OneByOne(noise_images(work, work.batch * _BATCHES))
    loader = DataLoader(
        dataset,
        work.batch,
        shuffle=True,
        num_workers=_WORKERS,
        persistent_workers=_WORKERS > 0,
        pin_memory=work.device != "cpu",
    )
    run = work.run("joint")

    def epoch() -> None:
        for batch in loader:
            images, labels = (part.to(work.device, non_blocking=True) for part in batch)
            run.train_step((images, labels))

    return epoch


class _OneByOne(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A data set that augments one image at a time."""

    def __init__(self, data: TensorData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.train_labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = self._data
        offsets, flips = torch.randint(2 * data.padding + 1, (1, 2)), torch.rand(1) < 0.5
        image = crops_and_flips(data.train_images[index : index + 1], data.padding, offsets, flips)[0]
        mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (data.mean, data.std))
        return (image - mean) / std, data.train_labels[index]
