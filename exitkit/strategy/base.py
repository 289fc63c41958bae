"""TrainingStrategy: what a training method may decide. The base class is joint training; a method says what differs.

What a method decides are its *slots*. Methods compose (`ge+kd`) as long as no two claim one slot; gradient taps alone
may be many, since taps multiply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.errors import UserError, unknown
from exitkit.networks.cascade import MultiExitNetwork, Outputs
from exitkit.plugins import setting
from exitkit.strategy.run import Run

GRADIENT_TAP = "gradient tap"
LOGIT_LINK = "logit link"
OBJECTIVE = "objective"
EXIT_WEIGHTS = "exit weights"
UPDATE = "update"
PHASES = "phases"

# The hooks whose overriding claims a slot; `adapt` may claim either of two and so has to be declared.
HOOKS = {
    "exit_losses": OBJECTIVE,
    "exit_weights": EXIT_WEIGHTS,
    "train_step": UPDATE,
    "train_epoch": UPDATE,
    "phases": PHASES,
}
SLOTS = frozenset({GRADIENT_TAP, LOGIT_LINK, *HOOKS.values()})

Variant = Literal["paper", "released"]
"""Where a paper and its published code differ: which of the two a method follows."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training under one strategy, with a fresh optimiser.

    Args:
        name: what to call it in logs.
        strategy: who rules it; its `adapt` is applied to the network when the phase begins.
        epochs: how long it lasts.
        train: which parameters it moves: `all`, `heads`, `new` (those that this phase's `adapt` added), or those whose
            names begin with one of some prefixes (`("stages.0.", "heads.0.")`).
        batchnorm: `train` (batch statistics, running ones follow) or `frozen` (running statistics, unmoved, but for
            what is new or trained by its prefix).
        lr: the learning rate at its start; None: the recipe's. It follows the recipe's schedule.
        optimizer: `sgd` (with the recipe's momentum) or `adam`; both with the recipe's weight decay.
    """

    name: str
    strategy: TrainingStrategy
    epochs: int
    train: Literal["all", "heads", "new"] | tuple[str, ...] = "all"
    batchnorm: Literal["train", "frozen"] = "train"
    lr: float | None = None
    optimizer: Literal["sgd", "adam"] = "sgd"


class LearnedTable(NamedTuple):
    """Numbers that a method has learned besides the network, as a table that `exitkit show` draws.

    Attributes:
        title: what they are.
        rows, columns: names.
        values: one list a row; None where there is no number. They are taken to lie between 0 and 1.
    """

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


@dataclass(eq=False)
class TrainingStrategy:
    """Joint training: one step on the sum of all exits' mean losses. Methods override what they are about.

    A strategy is a dataclass; its fields are its hyper-parameters, which is what the command line sets, a recipe
    holds and a run records. It never holds modules: side networks are made with `run.auxiliary` in `prepare`.

    Class attributes:
        slots: the slots that this method claims.
        paper: authors, title, venue and year of the paper.
        removed: settings of earlier releases that changed no result, with their defaults; recipes that have them are
            still read.
    """

    slots: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""
    removed: ClassVar[Mapping[str, Any]] = {}

    label_smoothing: float = setting(0.0, "share of each label that is spread over all classes", kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; expected at least 0 and below 1")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for slot in sorted(cls.slots - SLOTS):
            raise TypeError(str(unknown(f"slot of {cls.__name__}", slot, sorted(SLOTS))))
        missing = {slot for hook, slot in HOOKS.items() if hook in vars(cls)} - cls.slots
        if missing:
            raise TypeError(f"{cls.__name__} overrides what is of {', '.join(sorted(missing))}; name that in `slots`")

    def claims(self) -> frozenset[str]:
        """Return the slots that this instance claims, given its field values."""
        return self.slots

    def settings(self) -> dict[str, Any]:
        """Return every field and its value."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def adapt(self, network: MultiExitNetwork) -> None:
        """Add gradient taps or a logit link to the network; must be repeatable (`add_tap` and `set_link` are)."""

    def released_names(self) -> Mapping[str, str]:
        """Return how the authors' files name what `adapt` puts into the network, for `load_released_weights`.

        {regular expression: replacement}, of what a name begins with; the first that matches counts. They see our own
        names of the link's tensors (`link....`), and the names that the backbone's layout gives to all others.
        """
        return {}

    def prepare(self, run: Run) -> None:
        """Make what training needs besides the network: side networks, ownership, fusion weights.

        Called once a phase, after `adapt` and before any saved state is loaded.
        """

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return what each exit is asked: K loss tensors [B], a list (stacked, every exit would own everything)."""
        return [self.cross_entropy(logits, batch[1]) for logits in outputs.logits]

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each image's loss [B] for logits [B, C] and labels [B]."""
        smoothing = self.label_smoothing
        return F.cross_entropy(at_least_float32(logits), labels, reduction="none", label_smoothing=smoothing)

    def observe(self, run: Run, losses: Sequence[Tensor], batch: Batch) -> None:
        """See the K losses [B], detached, after every forward pass of `run.losses`.

        For methods that adapt to the losses without claiming the update; `run.mean(losses[k].mean(), batch)` is the
        mean over the global batch.
        """

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Return how much each image counts at each exit [B, K], or None where all count alike; for diagnostics."""
        return None

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return how much each exit counts at this point of the schedule: K numbers."""
        return [1.0] * run.network.num_exits

    def train_step(self, run: Run, batch: Batch) -> None:
        """Turn one batch into one change of the parameters."""
        run.step(weighted_sum(run.losses(batch), run.weights()))

    def train_epoch(self, run: Run, batches: Iterable[Batch]) -> None:
        """Train for one epoch. Every iteration of `batches` is a pass over the same batches in the same order."""
        for batch in batches:
            self.train_step(run, batch)

    def teachers(self) -> tuple[str, ...]:
        """Return the other runs whose networks `run.teacher` is asked for: methods, or folders of finished runs.

        A method stands for the run of that method, with nothing set and all else the same; it is trained first.
        """
        return ()

    def ingredients(self) -> tuple[str, ...]:
        """Return the folders of the finished runs whose side networks `run.load_auxiliary` is asked for."""
        return ()

    def passes(self, exits: int) -> int:
        """Return how many times an epoch goes over the training data (for progress and the cost of training)."""
        return 1

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return what is trained when, on a network of `exits` exits, where `epochs` is the first phase's length."""
        return [Phase("train", self, epochs)]

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return what was learned besides the network, for people to look at."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be saved, besides network, optimiser and side networks, to go on with the same bits."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits in float32 where autocast left them in half precision, and as they are otherwise."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def weighted_sum(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_k weights[k] * mean(losses[k]); an exit of weight zero is left out of the graph."""
    terms = [loss.mean() * weight for loss, weight in zip(losses, weights, strict=True) if weight != 0]
    if not terms:
        raise UserError("every exit's weight is zero, so that there is nothing to train on; expected one above zero")
    return torch.stack(terms).sum()
