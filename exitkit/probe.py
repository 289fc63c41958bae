"""What can only be seen while a network trains, looked at on one fixed batch: it moves no weight and draws nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exitkit.randomness import generator

if TYPE_CHECKING:
    from exitkit.data.base import Batch, Data
    from exitkit.engine import Engine
    from exitkit.run import Run

IMAGES = 128
CHUNKS = 8
VALID = 0.1
"""An image is valid for an exit while that exit's probability of its class is below 1 - VALID."""


def probe_batch(data: Data, engine: Engine) -> Batch:
    """Return the images that every probe of a data set looks at: some of the training images, not augmented."""
    from exitkit.data.base import Batch

    count = len(data.split.train)
    positions = torch.randperm(count, generator=generator("probe"))[:IMAGES].sort().values
    (batch,) = data.batches("train", [positions], augment=False, seed=0)
    return Batch(engine.images(batch.images), engine.labels(batch.labels))


def probe(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Return what training looks like at this moment, on B images, for K exits and S = K stages.

    Returns:
        cosine [S, K, K]: between the gradients of every two exits' losses with respect to a stage's parameters; NaN
        where an exit does not read the stage.
        norm [S, K]: lengths of those gradients.
        total_norm, total_variance [S]: length of the gradient of the weighted sum of all losses, and the sum of its
        parameters' variances over eighths of the batch (what IMTA's equation 3 bounds).
        loss [K], valid [K]: mean loss, and share of the images whose class has a probability below 0.9.
        losses [B, K]: of each image; and weights [B, K] where the method weighs images.
    """
    network, weights = run.network, list(run.exit_weights())
    with run.seeded("probe", alike=False), torch.enable_grad():
        outputs = run.functional({}, batch.images, batchnorm="kept")
        losses = run.strategy.exit_losses(run, outputs, batch)
        stages = _stages(run)
        parameters = [parameter for members in stages for parameter in members]
        sizes = [sum(p.numel() for p in members) for members in stages]

        def gradient(loss: Tensor) -> list[Tensor]:
            if not (parameters and loss.requires_grad):
                return [torch.full((size,), torch.nan) for size in sizes]
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            unread = (torch.full_like(p, torch.nan) for p in parameters)
            flat = [(g if g is not None else nan).flatten() for g, nan in zip(found, unread, strict=True)]
            return list(torch.cat(flat).float().cpu().split(sizes))

        by_exit = [gradient(loss.mean()) for loss in losses]
        rows = torch.arange(len(batch.labels), device=batch.labels.device).chunk(CHUNKS)
        by_chunk = [gradient(sum_of(weights, [loss[chosen] for loss in losses])) for chosen in rows]
        seen = run.strategy.sample_weights(run, losses, outputs)
    record: dict[str, list[Tensor]] = {"cosine": [], "norm": [], "total_norm": [], "total_variance": []}
    for index in range(network.num_exits):
        each = torch.stack([pieces[index] for pieces in by_exit])
        read = ~each.isnan().all(1)
        each = each.nan_to_num()
        length = each.norm(dim=1)
        cosine = each @ each.t() / (length[:, None] * length[None, :]).clamp(min=1e-30)
        cosine[~read], cosine[:, ~read] = torch.nan, torch.nan
        record["cosine"].append(cosine)
        record["norm"].append(torch.where(read, length, torch.nan))
        chunks = torch.stack([pieces[index] for pieces in by_chunk]).nan_to_num()
        record["total_norm"].append(chunks.mean(0).norm())
        record["total_variance"].append(chunks.var(0).sum() if chunks.numel() else torch.tensor(0.0))
    table = torch.stack([loss.detach() for loss in losses], 1).float().cpu()
    chances = torch.stack([z.detach().float().softmax(1).cpu() for z in outputs.logits], 1)
    sure = chances[torch.arange(len(table)), :, batch.labels.cpu()]
    record_tensors = {name: torch.stack(values) for name, values in record.items()}
    record_tensors |= {"loss": table.mean(0), "valid": (sure < 1 - VALID).float().mean(0), "losses": table}
    return record_tensors | ({} if seen is None else {"weights": seen.detach().float().cpu()})


def stacked(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return probes one after the other as one tensor each [T, ...]; what some of them lack (weights) is NaN there."""
    known = {name: value for record in records for name, value in record.items()}
    return {
        name: torch.stack([r[name] if name in r else torch.full_like(value, torch.nan) for r in records])
        for name, value in known.items()
    }


def sum_of(weights: list[float], losses: list[Tensor]) -> Tensor:
    """Return sum_k weights[k] mean(losses[k])."""
    return torch.stack([weight * loss.mean() for weight, loss in zip(weights, losses, strict=True)]).sum()


def _stages(run: Run) -> list[list[Tensor]]:
    """Return each stage's trained parameters."""
    members: list[list[Tensor]] = [[] for _ in range(run.network.num_exits)]
    for name, parameter in run.network.named_parameters():
        found = re.match(r"stages\.(\d+)\.", name)
        if found and parameter.requires_grad:
            members[int(found[1])].append(parameter)
    return members
