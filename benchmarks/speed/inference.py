"""Time saved by early exit relative to the multiply-adds saved, and its overhead for a single image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from exitkit.benchmarks.speed.row import Row, judged, not_run
from exitkit.benchmarks.speed.timing import Ratio, paired_ratios
from exitkit.benchmarks.speed.work import Work
from exitkit.inference.adaptive import AdaptiveInference
from exitkit.inference.rule import ExitRule
from exitkit.inference.scores import scores
from exitkit.inference.thresholds import exit_counts, share_for_budget, thresholds
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.costs import cost

_BATCH = 256


def inference_rows(work: Work) -> Iterator[Row]:
    """Measure an operating point that saves half of the multiply-adds, and one image that leaves at the last exit."""
    limits = {"cpu": 0.9, "cuda": 0.75}
    for device, limit in limits.items():
        target = f"{device}: time saved per multiply-adds saved, at batch {_BATCH}, half of them saved"
        alone = f"{device}: a single image through all exits, in runs of the full network"
        if device == "cuda" and not torch.cuda.is_available():
            yield not_run(target, limit)
            yield not_run(alone, 1.05)
            continue
        yield judged(target, limit, saved(replace(work, batch=_BATCH, device=device)), at_least=True)
        yield judged(alone, 1.05, single(replace(work, batch=1, device=device, rounds=max(10 * work.rounds, 1))))


def halved(network: MultiExitNetwork) -> tuple[np.ndarray, float]:
    """Return the multiply-adds up to each exit [K], and the q whose operating point saves half of them."""
    costs = np.array([row.macs for row in cost(network)], dtype=np.float64)
    return costs, float(share_for_budget(costs, [costs[-1] / 2])[0])


def saved(work: Work) -> Ratio:
    """Return the fraction of time saved / the fraction of multiply-adds saved, at the operating point of `halved`."""
    network, images = work.build().eval(), work.data()[0]
    costs, q = halved(network)
    with torch.inference_mode():
        logits = torch.stack(network(images).logits, 1).float().cpu().numpy()
    confidences = scores(logits, "confidence")
    counts = exit_counts(len(confidences), len(costs), [q])
    rule = ExitRule("confidence", tuple(thresholds(confidences, counts)[0]))
    adaptive = AdaptiveInference(network, rule)
    operations = 1 - costs[adaptive(images).exits.cpu()].mean() / costs[-1]
    ratio = paired_ratios(lambda: adaptive(images), lambda: _full(network, images), work.rounds)
    median, low, high = (float((1 - part) / operations) for part in (ratio.median, ratio.high, ratio.low))
    return Ratio(median, low, high, ratio.seconds)


def single(work: Work) -> Ratio:
    """Return the time of one image that leaves at the last exit, relative to the full network."""
    network, images = work.build().eval(), work.data()[0]
    unreachable = (2.0,) * (network.num_exits - 1)  # unreachable, but the confidence of every exit is computed
    adaptive = AdaptiveInference(network, ExitRule("confidence", (*unreachable, -np.inf)))
    return paired_ratios(lambda: adaptive(images), lambda: _full(network, images), work.rounds, warmups=3)


@torch.inference_mode()
def _full(network: torch.nn.Module, images: torch.Tensor) -> None:
    network(images)
