"""IMTA: knowledge from the exits before (ISC), knowledge from the last exit (OFA), and two phases of training.

Paper: Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019. The first phase trains the network
with Gradient Equilibrium (its section 3.2, our ge.py). The second freezes it and trains new classifiers in the place of
the old ones, on the features p_k that those read:

- Inline Subnetwork Collaboration (section 3.3): exit k also gets h_k, what a small path makes of the logits o_{k-1} of
  the exit before: h_k = ReLU(BN(Linear(o_{k-1}))), as wide as p_k, and o_k = Linear([p_k, h_k]). With the identity
  path that the paper offers beside it, o_k = Linear(p_k) + o_{k-1}. No gradient passes the path backwards.
- One-for-all distillation (section 3.4): L_k = (1 - g) CE(o_k) + g T^2 KL(softmax(z_K / T) || softmax(o_k / T)) for
  k < K, and L_K = CE(o_K); the teacher's logits z_K are those of the *old* last classifier.

What differs from the published code, all to be had by `variant = "released"`: it lets the gradient pass the paths
(`isc_detach`), divides the KL term by the number of classes (`kd_reduction`: PyTorch's mean over elements), lets the
frozen network's batch norm normalise by batch statistics and move its running ones (`batchnorm`), and rescales only
MSDNet's coarsest scale in the first phase (`ge_scope`). g = 0.1 and T = 1 are its script's for ImageNet; neither paper
nor code says them for CIFAR. The second phase lasts 0.6 times the first, as the paper has it on CIFAR (180 and 300
epochs; on ImageNet both are 90: `ratio=1`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from exitkit.distillation import distillation_losses
from exitkit.errors import UserError
from exitkit.methods.ge import GradientEquilibrium, Scope
from exitkit.network import Carry, LogitLink, MultiExitNetwork
from exitkit.plugins import resolve_variant, setting
from exitkit.strategy import (
    GRADIENT_TAP,
    LOGIT_LINK,
    OBJECTIVE,
    PHASES,
    Composition,
    Phase,
    TrainingStrategy,
    Variant,
)

if TYPE_CHECKING:
    from exitkit.data.base import Batch
    from exitkit.network import Outputs
    from exitkit.run import Run

Path = Literal["learned", "identity", "none"]
Reduction = Literal["batchmean", "mean"]
PAPER = "Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019"


class KnowledgeLink(LogitLink):
    """o_k from the feature p_k and the logits o_{k-1} of the exit before; the heads' own classifiers are not asked.

    Args:
        widths: d_k, the width of each exit's feature.
        classes: C.
        path: see the module's text; `none`: new classifiers alone.
        detach: whether no gradient passes from exit k to exit k - 1.
    """

    def __init__(self, widths: Sequence[int], classes: int, path: Path, detach: bool) -> None:
        super().__init__()
        self.config = (tuple(widths), classes, path, detach)
        self.path, self.detach = path, detach
        learned = path == "learned"
        inputs = [width * (2 if learned and index else 1) for index, width in enumerate(widths)]
        self.answers = nn.ModuleList(nn.Linear(width, classes) for width in inputs)
        self.paths = nn.ModuleList(
            nn.Sequential(nn.Linear(classes, width), nn.BatchNorm1d(width), nn.ReLU())
            for width in (widths[1:] if learned else ())
        )

    def forward(self, index: int, raw: Tensor, embedding: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Return o_k [B, C] twice: as the exit's output, and for the next exit."""
        feature = embedding.flatten(1)
        if index == 0 or self.path == "none":
            answer = self.answers[index](feature)
            return answer, answer
        before = carry.detach() if self.detach else carry
        if self.path == "identity":
            answer = self.answers[index](feature) + before
        else:
            answer = self.answers[index](torch.cat([feature, self.paths[index - 1](before)], 1))
        return answer, answer


@dataclass(eq=False)
class InlineCollaboration(TrainingStrategy):
    """Inline Subnetwork Collaboration: every exit also gets what the exit before it said."""

    slots: ClassVar[frozenset[str]] = frozenset({LOGIT_LINK})
    paper: ClassVar[str] = PAPER

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    path: Path = setting("learned", "how the logits of the exit before come in; none: new classifiers alone")
    isc_detach: bool | None = setting(
        None, "no gradient passes to the exit before", variant={"paper": True, "released": False}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)

    def adapt(self, network: MultiExitNetwork) -> None:
        """Put new classifiers and the paths between them into the network."""
        assert self.isc_detach is not None  # set by the variant
        link = KnowledgeLink(network.embedding_widths(), network.num_classes, self.path, self.isc_detach)
        network.set_link(link.to(next(network.parameters())))

    def released_names(self) -> Mapping[str, str]:
        """Return how the authors' files name the new classifiers, the paths and the frozen network."""
        return {r"link\.answers\.": "classifier.", r"link\.paths\.(\d+)\.": r"isc_modules.\1.", "": "net."}


@dataclass(eq=False)
class OneForAll(TrainingStrategy):
    """One-for-all distillation: every exit but the last also learns from the last one."""

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})
    paper: ClassVar[str] = PAPER

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    gamma: float = setting(0.1, "share of the teacher in what an exit learns from; the rest is the label's")
    temperature: float = setting(1.0, "T, how much both are softened before they are compared")
    kd_reduction: Reduction | None = setting(
        None,
        "true divergence, or that divided by the number of classes",
        variant={"paper": "batchmean", "released": "mean"},
    )
    teacher: Literal["exit", "head"] = setting(
        "exit", "the last exit's output, or its head's own classifier (another one where a link replaces it)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma is {self.gamma}; expected a share between 0 and 1")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; expected above 0")

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return L_k [B] of every exit."""
        *early, last = super().exit_losses(run, outputs, batch)
        teacher = outputs.raw[-1] if self.teacher == "head" else outputs.logits[-1]
        share = self.gamma / (teacher.shape[1] if self.kd_reduction == "mean" else 1)
        taught = [distillation_losses(logits, teacher, self.temperature) for logits in outputs.logits[:-1]]
        return [*((1 - self.gamma) * own + share * given for own, given in zip(early, taught, strict=True)), last]


@dataclass(eq=False)
class IMTA(TrainingStrategy):
    """IMTA: Gradient Equilibrium, then ISC and OFA with new classifiers on the frozen network."""

    slots: ClassVar[frozenset[str]] = frozenset({PHASES, GRADIENT_TAP, LOGIT_LINK, OBJECTIVE})
    paper: ClassVar[str] = PAPER

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    first: Literal["ge", "joint"] = setting("ge", "how the first phase trains the network")
    second: Literal["isc+ofa", "isc", "ofa", "none"] = setting(
        "isc+ofa", "what the second phase trains new classifiers with; none: there is no second phase"
    )
    ratio: float = setting(0.6, "length of the second phase, in lengths of the first")
    path: Literal["learned", "identity"] = setting("learned", "how ISC brings in the logits of the exit before")
    gamma: float = setting(0.1, "OFA's share of the teacher; the rest is the label's")
    temperature: float = setting(1.0, "OFA's T, how much teacher and exit are softened")
    isc_detach: bool | None = setting(
        None, "no gradient passes to the exit before", variant={"paper": True, "released": False}
    )
    kd_reduction: Reduction | None = setting(
        None,
        "true divergence, or that divided by the number of classes",
        variant={"paper": "batchmean", "released": "mean"},
    )
    batchnorm: Literal["frozen", "train"] | None = setting(
        None, "batch norm of the frozen network", variant={"paper": "frozen", "released": "train"}
    )
    ge_scope: Scope | None = setting(
        None, "which onward tensors are rescaled", variant={"paper": "all", "released": "coarsest"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        if not (self.ratio > 0 and math.isfinite(self.ratio)):
            raise UserError(f"ratio is {self.ratio}; expected above 0 (the paper's is 0.6 on CIFAR)")
        self.phases(1, 1)  # whatever is wrong with the values of the phases is wrong here

    def claims(self) -> frozenset[str]:
        """Claim what the two phases use."""
        taps = {GRADIENT_TAP} if self.first == "ge" else set()
        link = {LOGIT_LINK} if self.second != "none" else set()
        objective = {OBJECTIVE} if "ofa" in self.second else set()
        return frozenset({PHASES} | taps | link | objective)

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the training of the network, and that of the new classifiers on it."""
        smoothing = self.label_smoothing
        first: TrainingStrategy = TrainingStrategy(label_smoothing=smoothing)
        if self.first == "ge":
            first = GradientEquilibrium(variant=self.variant, ge_scope=self.ge_scope, label_smoothing=smoothing)
        trunk = Phase("network", first, epochs)
        if self.second == "none":
            return [trunk]
        parts: dict[str, TrainingStrategy] = {
            "isc": InlineCollaboration(
                variant=self.variant,
                path=self.path if "isc" in self.second else "none",
                isc_detach=self.isc_detach,
                label_smoothing=smoothing,
            )
        }
        if "ofa" in self.second:
            parts["ofa"] = OneForAll(
                variant=self.variant,
                gamma=self.gamma,
                temperature=self.temperature,
                kd_reduction=self.kd_reduction,
                teacher="head",
                label_smoothing=smoothing,
            )
        assert self.batchnorm is not None  # set by the variant
        length = max(round(self.ratio * epochs), 1)
        return [trunk, Phase("classifiers", Composition(parts), length, train="new", batchnorm=self.batchnorm)]
