"""The measured work: steps and epochs of any method on one network and one batch, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from exitkit.data.base import Batch
from exitkit.engine.devices import Layout
from exitkit.engine.precision import choose_precision
from exitkit.networks.build import build_network
from exitkit.strategy.base import TrainingStrategy
from exitkit.strategy.composition import build_strategy
from exitkit.training.local import LocalRun, local_run

if TYPE_CHECKING:
    from exitkit.networks.cascade import MultiExitNetwork

Step = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """The network and data of a measurement, and the number of measurements, `rounds`."""

    network: str = "msdnet-cifar-lg5"
    batch: int = 128
    device: str = "cpu"
    classes: int = 100
    shape: tuple[int, int, int] = (3, 32, 32)
    rounds: int = 7
    lr: float = 1e-3  # small, so that training on noise does not diverge in any number of steps

    def build(self) -> MultiExitNetwork:
        """Return the network with the same initial weights at every call."""
        torch.manual_seed(0)
        network = build_network(self.network, num_classes=self.classes, input_shape=self.shape)
        return network.to(self.device).train()

    def data(self) -> Batch:
        """Return one batch of noise."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, *self.shape, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return Batch(images.to(self.device), labels.to(self.device))

    def optimizer(self, network: MultiExitNetwork) -> torch.optim.SGD:
        """Return the optimiser of all loops."""
        return torch.optim.SGD(network.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)

    def run(
        self,
        method: str | TrainingStrategy,
        *,
        precision: str = "fp32",
        layout: Layout = "auto",
        **settings: Any,
    ) -> LocalRun:
        """Return a local run of a method; `precision` may be `auto`."""
        network = self.build()
        strategy = build_strategy(method, **settings) if isinstance(method, str) else method
        chosen = choose_precision(precision, torch.device(self.device))
        return local_run(network, strategy, self.optimizer(network), precision=chosen, layout=layout)

    def step(self, method: str | TrainingStrategy, *, at: int = 0, **settings: Any) -> Step:
        """Return a function that runs one training step of a method, as step `at` of an epoch."""
        run, batch = self.run(method, **settings), self.data()
        run.position.steps, run.position.step = 1000, at

        def step() -> None:
            run.position.single = 0  # every call is the same step of the epoch
            run.train_step(batch)

        return step

    def epoch(self, method: str, batches: int, **settings: Any) -> Step:
        """Return a function that trains one epoch of `batches` batches."""
        run, batch = self.run(method, **settings), self.data()
        run.position.epochs = 10**9  # more than are ever measured
        return lambda: run.train_epoch([batch] * batches)


def bare(work: Work) -> Step:
    """Return a function that runs one forward and one backward only, without optimiser, meter and strategy."""
    network, (images, labels) = work.build(), work.data()

    def step() -> None:
        network.zero_grad(set_to_none=True)
        losses = [torch.nn.functional.cross_entropy(logits, labels) for logits in network(images).logits]
        torch.stack(losses).sum().backward()

    return step
