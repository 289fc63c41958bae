"""Features of a frozen trunk: what the heads read, computed once for all epochs of a phase, and stored with the run."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from exitkit.data.base import Batch, Data, Part
from exitkit.engine.devices import Placement
from exitkit.engine.engine import Engine
from exitkit.errors import Note, UserError
from exitkit.files import disk_error, drafted, exists, read_json, write_json
from exitkit.networks.cascade import Features, MultiExitNetwork
from exitkit.networks.folding import fold
from exitkit.runs.evaluate import augment_validation
from exitkit.runs.folder import FEATURES, RunFolder
from exitkit.runs.job import Job, images_digest
from exitkit.strategy.base import Phase
from exitkit.strategy.position import Position
from exitkit.training.batches import view_of
from exitkit.training.checkpoint import tensors_digest

_BATCH = 64  # the activations of larger batches leave the CPU's caches: 256 images take 1.2 times as long each
_KEY = "features.json"
_MIB = 2**20

View = tuple[Part, bool, int]
"""A part, whether its images are augmented, and the seed of the augmentation."""


@dataclass(frozen=True)
class FeatureData(Data):
    """A run's training and validation images, as the features that the heads read.

    Attributes:
        stored: {view: one array [N, ...] per exit, read from disk when a batch needs its rows}.
    """

    stored: Mapping[View, Sequence[np.ndarray]]

    def batches(self, part: Part, positions: Sequence[Tensor], *, augment: bool, seed: int) -> Iterator[Batch]:
        """See `Data.batches`; the images of a batch are `Features`."""
        arrays, labels = self.stored[part, augment, seed], self.labels(part)
        for batch in positions:
            rows = batch.numpy()
            features = Features(tuple(torch.from_numpy(array[rows]) for array in arrays))
            yield Batch(cast(Tensor, features), labels[batch])


def stores_features(phase: Phase) -> bool:
    """Whether the features of a phase are computed once: its trunk is fixed, and nothing needs the images again.

    A teacher from another run reads the images.
    """
    trunk = phase.trunk
    return trunk is not None and trunk.cache and trunk.views is not None and not phase.strategy.teacher_runs()


@contextlib.contextmanager
def phase_data(
    job: Job, number: int, engine: Engine, folder: RunFolder, report: Callable[[float, float], None]
) -> Iterator[Data]:
    """Yield the data of a phase: the job's images, or their features if the phase stores them.

    Features are computed by the main rank, and used again by a run that resumes with the same weights and images. They
    are deleted at the end of the block, unless it ends by an error or an interrupt.

    Args:
        job: the job; its network has the weights of the phase.
        number: index of the phase.
        engine: this process's engine.
        folder: the run's folder.
        report: called with the share of the features that is done, and batches per second.

    Raises:
        UserError: the features do not fit on the disk.
    """
    if not stores_features(job.phases[number]):
        yield job.data
        return
    path, views, key = folder.path / FEATURES, _views(job, number), _key(job, number)
    with engine.ranks.agreeing():  # only the main rank writes files
        if engine.ranks.is_main and not _is_of(path, key):
            shutil.rmtree(path, ignore_errors=True)
            _store(job, views, key, engine, path, report)
    arrays = {
        view: [np.load(path / _file(at, k), mmap_mode="r") for k in range(job.network.num_exits)]
        for at, view in enumerate(views)
    }
    common = {field.name: getattr(job.data, field.name) for field in dataclasses.fields(Data)}
    yield FeatureData(**common, stored=arrays)
    with engine.ranks.agreeing():  # until all ranks have read them
        del arrays
    if engine.ranks.is_main:
        shutil.rmtree(path, ignore_errors=True)


def _views(job: Job, number: int) -> list[View]:
    """Return the views of the images that the epochs of a phase read."""
    phase = job.phases[number]
    epochs = (Position(phase=number, epoch=epoch, epochs=phase.epochs) for epoch in range(phase.epochs))
    training = dict.fromkeys(("train", *view_of(job.recipe, at, phase.trunk)) for at in epochs)
    return [*cast("dict[View, None]", training), ("validation", augment_validation(job.recipe, "validation"), 0)]


def _key(job: Job, number: int) -> dict[str, Any]:
    """Return what the features depend on."""
    return {
        "run": job.recipe.id,
        "phase": number,
        "trunk": tensors_digest(job.network.stages.state_dict()),
        "images": images_digest(job.recipe),
        "precision": job.recipe.precision,
        "views": [list(view) for view in _views(job, number)],
    }


def _is_of(path: Path, key: Mapping[str, Any]) -> bool:
    try:
        return exists(path / _KEY) and bool(read_json(path / _KEY) == dict(key))
    except UserError:  # damaged
        return False


def _file(view: int, exit: int) -> str:
    return f"view-{view}-exit-{exit + 1}.npy"


def _store(
    job: Job,
    views: Sequence[View],
    key: Mapping[str, Any],
    engine: Engine,
    path: Path,
    report: Callable[[float, float], None],
) -> None:
    """Compute the features of all views, and write them into a folder that appears when it is complete."""
    # On CPUs, convolutions are faster in this layout, also where training keeps the contiguous one.
    channels_last = engine.placement.channels_last or engine.placement.device.type == "cpu"
    placement = dataclasses.replace(engine.placement, channels_last=channels_last)
    network, counts = _folded(job.network.eval()), [len(job.data.labels(view[0])) for view in views]
    placement.network(network.stages)
    shapes = _shapes(network, placement)
    _announce(path, counts, shapes)
    try:
        with drafted(path) as draft:
            done, began = 0, time.perf_counter()
            for at, view in enumerate(views):
                with contextlib.ExitStack() as opened:
                    files = [opened.enter_context((draft / _file(at, k)).open("wb")) for k in range(len(shapes))]
                    for file, shape in zip(files, shapes, strict=True):
                        header = {"descr": "<f4", "fortran_order": False, "shape": (counts[at], *shape)}
                        np.lib.format.write_array_header_2_0(file, header)
                    for features in _features(network, job.data, view, engine, placement):
                        for file, tensor in zip(files, features.tensors, strict=True):
                            file.write(tensor.float().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())
                        done += len(features.tensors[0])
                        rate = done / _BATCH / (time.perf_counter() - began)
                        report(done / sum(counts), rate)
            write_json(draft / _KEY, dict(key))
            draft.rename(path)
    except OSError as error:
        raise disk_error(path, error) from None


def _folded(network: MultiExitNetwork) -> MultiExitNetwork:
    """Return the network with its own heads on stages whose batch normalisation is folded."""
    trunk = fold(network)
    trunk.heads, trunk.keep_features = network.heads, network.keep_features
    return trunk


@torch.inference_mode()
def _features(
    network: MultiExitNetwork, data: Data, view: View, engine: Engine, placement: Placement
) -> Iterator[Features]:
    part, augment, seed = view
    positions = torch.arange(len(data.labels(part))).split(_BATCH)
    for batch in data.batches(part, positions, augment=augment, seed=seed):
        with engine.arithmetic.autocast():
            features = network.features(placement.images(batch.images))
        yield features


@torch.inference_mode()
def _shapes(network: MultiExitNetwork, placement: Placement) -> list[tuple[int, ...]]:
    """Return the shape of one image's features at each exit."""
    reference = next(network.parameters())
    image = torch.zeros(1, *network.input_shape, dtype=reference.dtype)
    return [tuple(tensor.shape[1:]) for tensor in network.features(placement.images(image)).tensors]


def _announce(path: Path, counts: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> None:
    """Print how large the features will be.

    Raises:
        UserError: the disk has not as much space.
    """
    size = 4 * sum(counts) * sum(int(np.prod(shape)) for shape in shapes)
    free = shutil.disk_usage(path.parent).free
    about = f"the features of {sum(counts):,} images at {len(shapes)} exits take {size / _MIB:,.0f} MiB"
    if size > free:
        raise UserError(
            f"{about}, and {path.parent} has {free / _MIB:,.0f} MiB free; choose another --out, or run the trunk in "
            "every epoch by --set cache=false"
        )
    warnings.warn(Note(f"{about} in {path}; the trunk runs once"), stacklevel=2)
