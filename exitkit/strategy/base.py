"""TrainingStrategy, the interface of training methods. The base class is joint training; a method overrides parts.

The *slots* of a method are the parts of training that it determines. Methods compose (`ge+kd`) unless two of them claim
the same slot; gradient taps may be claimed several times, since their factors multiply.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from exitkit.data.base import Batch
from exitkit.errors import UserError, unknown
from exitkit.networks.cascade import MultiExitNetwork, Outputs
from exitkit.plugins import fields, setting, written
from exitkit.strategy.run import Run

GRADIENT_TAP = "gradient tap"
LOGIT_LINK = "logit link"
OBJECTIVE = "objective"
EXIT_WEIGHTS = "exit weights"
UPDATE = "update"
PHASES = "phases"

# A method that overrides one of these hooks claims its slot; `adapt` may claim either of two slots.
HOOKS = {
    "exit_losses": OBJECTIVE,
    "exit_weights": EXIT_WEIGHTS,
    "train_step": UPDATE,
    "train_epoch": UPDATE,
    "phases": PHASES,
}
SLOTS = frozenset({GRADIENT_TAP, LOGIT_LINK, *HOOKS.values()})

Variant = Literal["paper", "released"]
"""What a method follows where a paper and its published code differ."""


@dataclass(frozen=True)
class FrozenTrunk:
    """The stages of a phase are fixed: not trained, and in evaluation mode (no dropout, fixed running statistics).

    Args:
        views: augmented views of each training image: None: a new one in every epoch; 0: the image, not augmented;
            V: epoch e sees view e mod V.
        cache: whether the features that the heads read are computed once and stored, if `views` is a number.
    """

    views: int | None = None
    cache: bool = True


@dataclass(frozen=True)
class Phase:
    """A part of training with one strategy and a new optimiser.

    Args:
        name: name of the phase in logs.
        strategy: the strategy of the phase; its `adapt` is applied to the network when the phase begins.
        epochs: number of epochs.
        train: the parameters that are trained: `all`, `heads`, `new` (those that this phase's `adapt` adds), or those
            whose names begin with one of several prefixes (`("stages.0.", "heads.0.")`).
        batchnorm: `train` (batch statistics; running statistics are updated) or `frozen` (fixed running statistics,
            except in modules that are new or trained by their prefix; stages and heads without a trained parameter are
            in evaluation mode, without dropout).
        lr: initial learning rate; None: the recipe's. It follows the recipe's schedule.
        optimizer: `sgd` (with the recipe's momentum) or `adam`; None: the recipe's. All have the recipe's weight decay.
        trunk: how the phase reads a fixed trunk, for phases that train no stage; None: stages are in training mode.
        calibrate: whether the network's temperatures are fitted on the validation images when the phase ends; its
            strategy's `adapt` adds them (`MultiExitNetwork.add_temperatures`).
    """

    name: str
    strategy: TrainingStrategy
    epochs: int
    train: Literal["all", "heads", "new"] | tuple[str, ...] = "all"
    batchnorm: Literal["train", "frozen"] = "train"
    lr: float | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    trunk: FrozenTrunk | None = None
    calibrate: bool = False


class LearnedTable(NamedTuple):
    """A table of numbers that a method learned besides the network, which `exitkit show` draws.

    Attributes:
        title: title of the table.
        rows, columns: names of the rows and the columns.
        values: one list per row; None for a missing number. Numbers must be between 0 and 1.
    """

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


@dataclass(eq=False)
class TrainingStrategy:
    """Joint training: one step on the sum of all exits' mean losses. Methods override its hooks.

    A strategy is a dataclass; its fields are its hyper-parameters, which the command line sets, and which recipes and
    runs store. It must not contain modules: side networks are registered by `run.auxiliary` in `prepare`.

    Class attributes:
        slots: the slots that this method claims.
        yields: the slots that it leaves to another part of a composition that claims them, too.
        whole_epochs: the method makes no single steps; it overrides `train_epoch` and not `train_step`.
        paper: authors, title, venue and year of the paper.
        removed: settings of earlier releases that changed no result, with their defaults; recipes with them can still
            be read.
    """

    slots: ClassVar[frozenset[str]] = frozenset()
    yields: ClassVar[frozenset[str]] = frozenset()
    whole_epochs: ClassVar[bool] = False
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
        if callable(own := vars(cls).get("teachers")):
            warnings.warn(f"{cls.__name__}.teachers is now called teacher_runs", DeprecationWarning, stacklevel=2)
            cls.teacher_runs = own  # type: ignore[method-assign]
        missing = {slot for hook, slot in HOOKS.items() if hook in vars(cls)} - cls.slots
        if missing:
            raise TypeError(f"{cls.__name__} overrides hooks of {', '.join(sorted(missing))}; add these to `slots`")

    def claims(self) -> frozenset[str]:
        """Return the slots that this instance claims, given its field values."""
        return self.slots

    def settings(self) -> dict[str, Any]:
        """Return all fields and their values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return {field: what it needs} of the fields that have no effect with the values of the others.

        Args:
            yielded: the slots that the method leaves to another part of its composition.
        """
        unused = {}
        for name, field in fields(type(self)).items():
            for other, values in field.metadata.get("needs", {}).items():
                if getattr(self, other) not in values:
                    unused[name] = f"{other}={written(values)}"
        return unused

    def adapt(self, network: MultiExitNetwork) -> None:
        """Add gradient taps or a logit link to the network; a second call must change nothing (as of `add_tap`)."""

    def released_names(self) -> Mapping[str, str]:
        """Return the names of the tensors that `adapt` adds in the authors' files, for `load_released_weights`.

        {regular expression: replacement} for the beginning of a name; the first match is used. The expressions are
        applied to exitkit's names of the link's tensors (`link....`), and to the file's names of all other tensors, as
        given by the backbone's layout.
        """
        return {}

    def prepare(self, run: Run) -> None:
        """Make what training needs besides the network, such as side networks.

        Called once per phase, after `adapt` and before a saved state is loaded.
        """

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return the loss of each exit: a list of K tensors [B] (stacked, their autograd graphs would be joined)."""
        return [self.cross_entropy(logits, batch[1]) for logits in outputs.logits]

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return each image's loss [B] for logits [B, C] and labels [B], or shares of the classes [B, C]."""
        smoothing = self.label_smoothing
        return F.cross_entropy(at_least_float32(logits), labels, reduction="none", label_smoothing=smoothing)

    def observe(self, run: Run, losses: Sequence[Tensor], batch: Batch) -> None:
        """Receive the K losses [B], detached, after every forward pass of `run.losses`.

        For methods that adapt to the losses without claiming the update; `run.mean(losses[k].mean(), batch)` is the
        mean over the global batch.
        """

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Return the weight of each image at each exit [B, K], or None if all weights are equal; for diagnostics."""
        return None

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the weights of the exits at this point of the schedule: K numbers."""
        return [1.0] * run.network.num_exits

    def train_step(self, run: Run, batch: Batch) -> None:
        """Update the parameters on one batch."""
        run.step(weighted_sum(run.losses(batch), run.weights()))

    def train_epoch(self, run: Run, batches: Iterable[Batch]) -> None:
        """Train for one epoch; each iteration over `batches` is a pass over the same batches in the same order."""
        for batch in batches:
            self.train_step(run, batch)

    def teacher_runs(self) -> tuple[str, ...]:
        """Return the other runs whose networks `run.teacher` uses: names of methods, or folders of finished runs.

        A method means the run of that method with its default settings and the same recipe otherwise; it is trained
        first.
        """
        return ()

    def refuses(self) -> Mapping[str, str]:
        """Return {key of a recipe: reason} of the options of fine-tuning that this method can't be trained with.

        The keys are `optimizer`, `warmup`, `trunk_lr_factor`, `mixup`, `cutmix` and `weight_ema`. With `mixup` and
        `cutmix` the labels of a batch are shares of the classes [B, C], which `cross_entropy` accepts.
        """
        return {}

    def ingredients(self) -> tuple[str, ...]:
        """Return the folders of the finished runs whose side networks `run.load_auxiliary` loads."""
        return ()

    def passes(self, exits: int) -> int:
        """Return the number of passes over the training data per epoch, for progress and the cost of training."""
        return 1

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the phases of training for a network of `exits` exits; `epochs` is the length of the first phase."""
        return [Phase("train", self, epochs)]

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return tables of what was learned besides the network, for display."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return the state, besides network, optimiser and side networks, that is needed to resume bit for bit."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits of half precision (autocast) in float32, and other logits unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def weighted_sum(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_k weights[k] * mean(losses[k]); exits of weight zero are left out of the graph.

    Raises:
        UserError: all weights are zero.
    """
    terms = [loss.mean() * weight for loss, weight in zip(losses, weights, strict=True) if weight != 0]
    if not terms:
        raise UserError("the weights of all exits are zero; expected at least one above zero")
    return torch.stack(terms).sum()
