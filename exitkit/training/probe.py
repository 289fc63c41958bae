"""Probes: measurements on one fixed batch while a network trains; weights and random states do not change."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from exitkit.data.base import Batch, Data
from exitkit.engine.engine import Engine
from exitkit.engine.randomness import generator
from exitkit.strategy.batch import LocalBatch
from exitkit.strategy.run import Run
from exitkit.training.observers import EpochEnd, Observer

IMAGES = 128
CHUNKS = 8
VALID = 0.1
"""An image is valid for an exit if the exit's probability of the image's class is below 1 - VALID."""


def probe_batch(data: Data, engine: Engine) -> Batch:
    """Return the batch for all probes of a data set: some training images, not augmented."""
    count = len(data.split.train)
    positions = torch.randperm(count, generator=generator("probe"))[:IMAGES].sort().values
    (batch,) = data.batches("train", [positions], augment=False, seed=0)
    return Batch(engine.placement.images(batch.images), engine.placement.labels(batch.labels))


class Probing(Observer):
    """Probes the network once every `every` epochs.

    Args:
        every: epochs between two probes.
        data: the run's images.
        engine: the run's engine.
    """

    def __init__(self, every: int, data: Data, engine: Engine) -> None:
        self._every, self._data, self._engine = every, data, engine

    def on_epoch_end(self, run: Run, end: EpochEnd) -> None:
        """Add a probe to the records after every `every` epochs."""
        epochs = len(end.history.metrics)
        if epochs % self._every == 0:
            measures = probe(run, probe_batch(self._data, self._engine))
            end.history.probes.append(measures | {"epoch": torch.tensor(epochs)})


def probe(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Measure gradients and losses of the current network on B images, for K exits and S = K stages.

    Returns:
        cosine [S, K, K]: cosines between the gradients of the exits' losses with respect to a stage's parameters; NaN
        if an exit does not read the stage.
        norm [S, K]: norms of those gradients.
        total_norm, total_variance [S]: norm of the gradient of the weighted sum of all losses, and the sum of its
        parameters' variances over eighths of the batch (which IMTA's equation 3 bounds).
        loss [K], valid [K]: mean loss, and share of the images whose class has a probability below 0.9.
        losses [B, K]: loss of each image; and weights [B, K], if the method weights the images.
    """
    run.batch = LocalBatch.of(batch)
    try:
        return _measure(run, batch)
    finally:
        run.batch = None


def _measure(run: Run, batch: Batch) -> dict[str, Tensor]:
    network, weights = run.network, list(run.weights())
    with run.seeded("probe", alike=False), torch.enable_grad():
        outputs = run.functional({}, batch.images, batchnorm="kept")
        losses = run.objective(outputs, batch)
        stages = _stages(run)
        parameters = [parameter for members in stages for parameter in members]
        sizes = [sum(p.numel() for p in members) for members in stages]

        def gradient(loss: Tensor) -> list[Tensor]:
            if not (parameters and loss.requires_grad):
                return [torch.full((size,), torch.nan) for size in sizes]
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            unread = (torch.full_like(p, torch.nan) for p in parameters)
            flat = [(g if g is not None else nan).flatten() for g, nan in zip(gradients, unread, strict=True)]
            return list(torch.cat(flat).float().cpu().split(sizes))

        by_exit = [gradient(loss.mean()) for loss in losses]
        eighths = torch.arange(len(batch.labels), device=batch.labels.device).chunk(CHUNKS)
        by_chunk = [gradient(sum_of(weights, [loss[chosen] for loss in losses])) for chosen in eighths]
        sample_weights = run.strategy.sample_weights(run, losses, outputs)
    record: dict[str, list[Tensor]] = {"cosine": [], "norm": [], "total_norm": [], "total_variance": []}
    for index in range(network.num_exits):
        rows = torch.stack([pieces[index] for pieces in by_exit])
        read = ~rows.isnan().all(1)
        rows = rows.nan_to_num()
        length = rows.norm(dim=1)
        cosine = rows @ rows.t() / (length[:, None] * length[None, :]).clamp(min=1e-30)
        cosine[~read], cosine[:, ~read] = torch.nan, torch.nan
        record["cosine"].append(cosine)
        record["norm"].append(torch.where(read, length, torch.nan))
        chunks = torch.stack([pieces[index] for pieces in by_chunk]).nan_to_num()
        record["total_norm"].append(chunks.mean(0).norm())
        record["total_variance"].append(chunks.var(0).sum() if chunks.numel() else torch.tensor(0.0))
    table = torch.stack([loss.detach() for loss in losses], 1).float().cpu()
    probabilities = torch.stack([z.detach().float().softmax(1).cpu() for z in outputs.logits], 1)
    of_label = probabilities[torch.arange(len(table)), :, batch.labels.cpu()]
    record_tensors = {name: torch.stack(values) for name, values in record.items()}
    record_tensors |= {"loss": table.mean(0), "valid": (of_label < 1 - VALID).float().mean(0), "losses": table}
    return record_tensors | ({} if sample_weights is None else {"weights": sample_weights.detach().float().cpu()})


def sum_of(weights: list[float], losses: list[Tensor]) -> Tensor:
    """Return sum_k weights[k] mean(losses[k])."""
    return torch.stack([weight * loss.mean() for weight, loss in zip(weights, losses, strict=True)]).sum()


def _stages(run: Run) -> list[list[Tensor]]:
    """Return the trained parameters of each stage."""
    members: list[list[Tensor]] = [[] for _ in range(run.network.num_exits)]
    for name, parameter in run.network.named_parameters():
        stage = re.match(r"stages\.(\d+)\.", name)
        if stage and parameter.requires_grad:
            members[int(stage[1])].append(parameter)
    return members
