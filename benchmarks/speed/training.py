"""Time of a training step of each method, relative to joint training, and to the loop of the published code.

Every ratio is measured with one network, one batch and one process: both steps alternate, and the result is the median
of the paired ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, TypedDict

import torch

from exitkit.benchmarks.campaign.usable import usable
from exitkit.benchmarks.speed.memory import step_mib
from exitkit.benchmarks.speed.plain import LOOPS
from exitkit.benchmarks.speed.row import Profile, Row, judged, not_run
from exitkit.benchmarks.speed.timing import Ratio, paired_ratios
from exitkit.benchmarks.speed.work import Step, Work, bare
from exitkit.engine.devices import Layout
from exitkit.engine.precision import choose_precision
from exitkit.plugins import registered
from exitkit.strategy.composition import build_strategy


class Form(TypedDict):
    """Precision and memory layout of a measured step."""

    precision: str
    layout: Layout


LIMITS = dict.fromkeys(("ge", "boostnet", "ofa", "isc"), 1.08)
"""Methods that change the gradient flow or the objective: one forward and one backward, as in joint training."""
AGGREGATED = 2.3
"""Limit of methods that need one gradient per exit, for 5 exits: K backwards, each through the stages of its exit."""
AGGREGATORS = ("pcgrad", "cagrad", "mgda", "imtlg", "aligned", "graddrop", "upgrad", "dualproj", "config", "nashmtl")


PLAIN_LIMITS = {"joint": 2.0, "ge": 2.0, "boostnet": 2.0, "ofa": 2.0, "pcgrad": 1.8, "l2w": 2.5, "metagf": 3.0}
"""Least speed of a method with `--precision auto`, in that of the plain loop."""
PLAIN_FP32_LIMIT = 1.15
"""The same of joint training in fp32."""
FORMS: dict[str, Form] = {
    "fp32": {"precision": "fp32", "layout": "contiguous"},
    "fp32, channels-last": {"precision": "fp32", "layout": "channels-last"},
    "auto": {"precision": "auto", "layout": "auto"},
}
"""The precisions and layouts that are measured against the plain loop."""


class Speedup(NamedTuple):
    """Speed of a method's training in each of `FORMS`, in that of the plain loop."""

    method: str
    ratios: dict[str, Ratio]


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


def plain_rows(work: Work) -> Iterator[Speedup | Row | Profile]:
    """Measure each method that has a plain loop against it; a missed target also yields a profile.

    The targets of `--precision auto` are those of a processor with bf16 instructions; on another, they are not run.
    """
    forms = (
        FORMS
        if choose_precision("auto", torch.device("cpu")) == "bf16"
        else {k: v for k, v in FORMS.items() if k != "auto"}
    )
    for name, loop in LOOPS.items():
        plain, ratios = loop(work), {}
        if "auto" not in forms:
            yield not_run(_speed_target(name, "auto"), PLAIN_LIMITS[name])
        for form, values in forms.items():
            ours = work.epoch(name, 2, **values) if name == "metagf" else work.step(name, **values)
            ratios[form] = paired_ratios(plain, ours, work.rounds)
            limits = {"auto": PLAIN_LIMITS[name], "fp32, channels-last": PLAIN_FP32_LIMIT if name == "joint" else None}
            if (limit := limits.get(form)) is not None:
                row = judged(_speed_target(name, form), limit, ratios[form], at_least=True)
                yield row
                if row.verdict == "missed":
                    yield Profile(row.target, largest_shares(ours))
        yield Speedup(name, ratios)


def _speed_target(method: str, form: str) -> str:
    return f"{method}: speed in that of the plain loop, {form}"


def largest_shares(step: Step, count: int = 8) -> dict[str, float]:
    """Return the operations that take the largest shares of a step's time, and these shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events[:count]}
