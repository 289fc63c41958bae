"""What is timed: steps and epochs of any method on one network and one batch, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from exitkit.data.base import Batch
from exitkit.engine.precision import Precision
from exitkit.networks.build import build_network
from exitkit.strategy.base import TrainingStrategy
from exitkit.strategy.composition import build_strategy
from exitkit.training.local import LocalRun, local_run

if TYPE_CHECKING:
    from exitkit.networks.cascade import MultiExitNetwork

Step = Callable[[], None]


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

    def data(self) -> Batch:
        """Return one batch of noise."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, *self.shape, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return Batch(images.to(self.device), labels.to(self.device))

    def run(self, method: str | TrainingStrategy, *, precision: Precision = "fp32", **settings: Any) -> LocalRun:
        """Return a run of a method in memory."""
        network = self.build()
        # So small a rate that nothing becomes infinite on noise, however many steps are timed.
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        strategy = build_strategy(method, **settings) if isinstance(method, str) else method
        return local_run(network, strategy, optimizer, precision=precision)

    def step(self, method: str | TrainingStrategy, *, at: int = 0, **settings: Any) -> Step:
        """Return what makes one step of a method, as number `at` of an epoch."""
        run, batch = self.run(method, **settings), self.data()
        run.position.steps, run.position.step = 1000, at
        return lambda: run.train_step(batch)

    def epoch(self, method: str, batches: int, **settings: Any) -> Step:
        """Return what trains one epoch of a few batches."""
        run, batch = self.run(method, **settings), self.data()
        run.position.epochs = 10**9  # however many are timed
        return lambda: run.train_epoch([batch] * batches)


def bare(work: Work) -> Step:
    """Return one forward and one backward, without optimiser, meter or strategy: the floor."""
    network, (images, labels) = work.build(), work.data()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in network(images).logits]
        torch.stack(losses).sum().backward()

    return step
