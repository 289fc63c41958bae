"""Peak memory of a training step, each measured in a new process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from exitkit.benchmarks.speed.plain import DoubleBackward
from exitkit.benchmarks.speed.row import Row, not_run
from exitkit.benchmarks.speed.work import Work
from exitkit.engine.memory import begin_peak, give_back_freed, peak_mib
from exitkit.strategy.base import TrainingStrategy


def step_mib(work: Work, method: str | TrainingStrategy) -> float:
    """Return the peak memory of a training step in MiB, relative to the memory allocated between steps."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_step_mib, work, method).result()


def _step_mib(work: Work, method: str | TrainingStrategy) -> float:
    torch.set_num_threads(1)
    step, device = work.step(method), torch.device(work.device)
    step()  # allocates the optimiser's momentum
    give_back_freed()
    begin_peak(device)
    before = peak_mib(device)
    step()
    return peak_mib(device) - before


def l2w_memory_row(work: Work) -> Row:
    """Measure the peak memory that L2W saves with forward-mode differentiation against double backward."""
    forward = step_mib(work, "l2w")
    double = step_mib(work, DoubleBackward())
    target = "l2w: share of peak memory saved, forward mode against double backward"
    if not forward > 0 or not double > 0:  # the system does not report the peak of a step
        return not_run(target, 0.35)
    saved = 1 - forward / double
    return Row(target, 0.35, saved, None, "met" if saved >= 0.35 else "missed")
