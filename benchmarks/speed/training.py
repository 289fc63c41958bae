"""Time of a training step of each method, relative to a step of joint training of the same network.

Every ratio is measured with one network, one batch and one process: steps of the method and of joint training
alternate, and the result is the median of the paired ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from exitkit.benchmarks.campaign.usable import usable
from exitkit.benchmarks.speed.memory import step_mib
from exitkit.benchmarks.speed.row import Row, judged
from exitkit.benchmarks.speed.timing import Ratio, paired_ratios
from exitkit.benchmarks.speed.work import Step, Work, bare
from exitkit.plugins import registered
from exitkit.strategy.composition import build_strategy

LIMITS = dict.fromkeys(("ge", "boostnet", "ofa", "isc"), 1.08)
"""Methods that change the gradient flow or the objective: one forward and one backward, as in joint training."""
AGGREGATED = 2.3
"""Limit of methods that need one gradient per exit, for 5 exits: K backwards, each through the stages of its exit."""
AGGREGATORS = ("pcgrad", "cagrad", "mgda", "imtlg", "aligned", "graddrop", "upgrad", "dualproj", "config", "nashmtl")


class Measured(NamedTuple):
    """A training step of a method: time relative to a joint step, images per second, and peak memory in MiB."""

    method: str
    ratio: Ratio
    images_per_second: float
    peak_mib: float


def methods(work: Work) -> list[str]:
    """Return all registered methods with one phase, one pass over the data per epoch, and no teacher."""
    matches, exits = [], work.build().num_exits
    for name in usable(list(registered("method"))):
        strategy = build_strategy(name)
        if len(strategy.phases(exits, exits)) == 1 and strategy.passes(exits) == 1 and not strategy.teacher_runs():
            matches.append(name)
    return matches


def step_rows(work: Work) -> Iterator[Measured | Row]:
    """Measure a step of each method against joint training; methods with a limit also yield a row."""
    joint = work.step("joint")
    yield _measured("bare forward and backward", bare(work), joint, work, math.nan)
    for name in methods(work):
        measured = _measured(name, work.step(name), joint, work, step_mib(work, name))
        yield measured
        if name in LIMITS or name in AGGREGATORS:
            yield judged(f"{name}: a step, in joint steps", LIMITS.get(name, AGGREGATED), measured.ratio)


def _measured(name: str, ours: Step, joint: Step, work: Work, peak_mib: float) -> Measured:
    ratio = paired_ratios(ours, joint, work.rounds)
    return Measured(name, ratio, work.batch / ratio.seconds, peak_mib)


def l2w_rows(work: Work, large: int = 256, small: int = 32) -> Iterator[Row]:
    """Measure L2W with a meta step per iteration, with large and small half batches, and with interval 100."""
    for half, limit in ((large, 3.7), (small, 5.0)):
        sized = replace(work, batch=2 * half)
        ratio = paired_ratios(sized.step("l2w"), sized.step("joint"), work.rounds)
        yield judged(f"l2w: a step, in joint steps; half batches of {half}", limit, ratio)
    joint = work.step("joint")
    with_meta = paired_ratios(work.step("l2w", interval=100), joint, work.rounds)
    without = paired_ratios(work.step("l2w", interval=100, at=1), joint, work.rounds)
    mixed = Ratio(*(0.01 * one + 0.99 * other for one, other in zip(with_meta, without, strict=True)))
    yield judged("l2w: a step, in joint steps; meta step at every 100th", 1.1, mixed)


def metagf_rows(work: Work, batches: int = 2) -> Iterator[Row]:
    """Measure an epoch of Meta-GF (K branches and the fusion, K + 1 passes) against an epoch of joint training."""
    passes = work.build().num_exits + 1
    ratio = paired_ratios(work.epoch("metagf", batches), work.epoch("joint", batches), work.rounds)
    yield judged(f"metagf: an epoch, in joint epochs ({passes} passes)", 1.05 * passes, ratio)
