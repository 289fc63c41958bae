"""What a training step of each method costs, in steps of plain joint training of the same network.

Every ratio is of one network, one batch and one process: a step of the method and one of joint training take turns,
and the median of the paired ratios counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from exitkit.benchmarks.speed.row import Row, judged
from exitkit.benchmarks.speed.timing import Ratio, paired_ratios
from exitkit.build import build_network, build_strategy
from exitkit.plugins import registered
from exitkit.run import Run

if TYPE_CHECKING:
    from exitkit.network import MultiExitNetwork

Step = Callable[[], None]

LIMITS = dict.fromkeys(("ge", "boostnet", "ofa", "isc"), 1.08)
"""Methods that change how gradients flow or what is asked: one forward and one backward, as joint training."""
AGGREGATED = 2.3
"""Methods that want every exit's own gradient, at 5 exits: K backwards, each through the stages below its exit only."""
AGGREGATORS = ("pcgrad", "cagrad", "mgda", "imtlg", "aligned", "graddrop", "upgrad", "dualproj", "config", "nashmtl")


@dataclass(frozen=True)
class Work:
    """What is trained, and how often the clock is read."""

    network: str = "msdnet-cifar-lg5"
    batch: int = 128
    device: str = "cpu"
    classes: int = 100
    shape: tuple[int, int, int] = (3, 32, 32)
    rounds: int = 7

    def build(self) -> MultiExitNetwork:
        """Return the network, the same at every call."""
        torch.manual_seed(0)
        network = build_network(self.network, num_classes=self.classes, input_shape=self.shape)
        return network.to(self.device).train()

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one batch of noise."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, *self.shape, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return images.to(self.device), labels.to(self.device)

    def run(self, method: str, **settings: Any) -> Run:
        """Return a run of a method in memory."""
        network = self.build()
        # So small a rate that nothing becomes infinite on noise, however many steps are timed.
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        return Run.local(network, build_strategy(method, **settings), optimizer)

    def step(self, method: str, *, at: int = 0, **settings: Any) -> Step:
        """Return what makes one step of a method, as number `at` of an epoch."""
        run, batch = self.run(method, **settings), self.data()
        run.position.steps, run.position.step = 1000, at
        return lambda: run.strategy.train_step(run, batch)

    def epoch(self, method: str, batches: int, **settings: Any) -> Step:
        """Return what trains one epoch of a few batches."""
        run, batch = self.run(method, **settings), self.data()
        return lambda: run.strategy.train_epoch(run, [batch] * batches)


class Measured(NamedTuple):
    """A method's step: its ratio to a joint step, and how many images a second it trains."""

    method: str
    ratio: Ratio
    images_per_second: float


def bare(work: Work) -> Step:
    """Return one forward and one backward, without optimiser, meter or strategy: the floor."""
    network, (images, labels) = work.build(), work.data()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in network(images).logits]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    return step


def methods(work: Work) -> list[str]:
    """Return the methods whose epoch is a row of steps on the whole network, ours and anyone else's."""
    found = []
    for name in registered("method"):
        strategy = build_strategy(name)
        plain = len(strategy.phases(1, work.build().num_exits)) == 1 and strategy.passes(work.build().num_exits) == 1
        if plain and not strategy.teachers():
            found.append(name)
    return found


def step_ratios(work: Work, names: list[str]) -> Iterator[Measured]:
    """Measure each method's step against joint training."""
    joint = work.step("joint")
    yield _measured("bare forward and backward", bare(work), joint, work)
    for name in names:
        yield _measured(name, work.step(name), joint, work)


def _measured(name: str, ours: Step, joint: Step, work: Work) -> Measured:
    ratio = paired_ratios(ours, joint, work.rounds)
    return Measured(name, ratio, work.batch / ratio.seconds)


def step_rows(found: list[Measured]) -> list[Row]:
    """Return the rows of those methods that have a limit."""
    rows = []
    for name, ratio, _ in found:
        if name in LIMITS or name in AGGREGATORS:
            limit = LIMITS.get(name, AGGREGATED)
            rows.append(judged(f"{name}: a step, in joint steps", limit, ratio))
    return rows


def l2w_rows(work: Work, large: int = 256, small: int = 32) -> Iterator[Row]:
    """Measure L2W with a meta step at every iteration at large and small half batches, and at interval 100."""
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
    """Measure an epoch of Meta-GF, K branches and the fusion, against K + 1 of joint training."""
    passes = work.build().num_exits + 1
    ratio = paired_ratios(work.epoch("metagf", batches), work.epoch("joint", batches), work.rounds)
    yield judged(f"metagf: an epoch, in joint epochs ({passes} passes)", 1.05 * passes, ratio)
