"""IMTA: collaboration with the exit before (ISC), distillation from the last exit (OFA), and two phases of training.

Paper: Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019, https://arxiv.org/abs/1908.06294

The first phase trains the network with Gradient Equilibrium (section 3.2, see ge.py). The second freezes it and trains
new classifiers in place of the old ones, on the same features p_k:

- Inline Subnetwork Collaboration (section 3.3): exit k also reads h_k = ReLU(BN(Linear(o_{k-1}))), as wide as p_k,
  computed from the logits o_{k-1} of the exit before: o_k = Linear([p_k, h_k]). With the identity path, the paper's
  alternative, o_k = Linear(p_k) + o_{k-1}. No gradient passes to the exit before.
- One-for-all distillation (section 3.4): L_k = (1 - g) CE(o_k) + g T^2 KL(softmax(z_K / T) || softmax(o_k / T)) for
  k < K, and L_K = CE(o_K); the teacher's logits z_K are those of the *old* last classifier.

What differs from the published code, which `variant = "released"` follows: gradients pass to the exit before
(`isc_detach`), the KL term is divided by the number of classes (`kd_reduction`: PyTorch's mean over elements), batch
norm of the frozen network normalises by batch statistics and updates its running ones (`batchnorm`), and the first
phase rescales only MSDNet's coarsest scale (`ge_scope`). g = 0.1 and T = 1 are the values of its script for ImageNet;
neither paper nor code gives those for CIFAR. The second phase lasts 0.6 times as long as the first, as in the paper on
CIFAR (180 and 300 epochs; on ImageNet both have 90: `ratio=1`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from exitkit.methods.distillation import distillation_losses
from exitkit.methods.ge import GradientEquilibrium
from exitkit.networks import Carry, LogitLink, MultiExitNetwork, Outputs
from exitkit.strategy import (
    LOGIT_LINK,
    OBJECTIVE,
    PHASES,
    SLOTS,
    Batch,
    Phase,
    Run,
    TrainingStrategy,
    UserError,
    Variant,
    build_strategy,
    forwarded,
    forwards,
    method_parts,
    resolve_variant,
    setting,
)

PAPER = "Li et al., Improved Techniques for Training Adaptive Deep Networks, ICCV 2019"


class KnowledgeLink(LogitLink):
    """Computes o_k from the feature p_k and the logits o_{k-1}; the heads' own classifiers are not used.

    Args:
        widths: d_k, the width of each exit's feature.
        classes: C.
        path: see the module; `none`: new classifiers without paths.
        detach: whether the gradient from exit k to exit k - 1 is stopped.
    """

    def __init__(self, widths: Sequence[int], classes: int, path: str, detach: bool) -> None:
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
        """Return o_k [B, C] twice: as the exit's output, and as the carry for the next exit."""
        feature = embedding.flatten(1)
        if index == 0 or self.path == "none":
            logits = self.answers[index](feature)
            return logits, logits
        previous = carry.detach() if self.detach else carry
        if self.path == "identity":
            logits = self.answers[index](feature) + previous
        else:
            logits = self.answers[index](torch.cat([feature, self.paths[index - 1](previous)], 1))
        return logits, logits


@dataclass(eq=False)
class InlineCollaboration(TrainingStrategy):
    """Inline Subnetwork Collaboration: every exit also reads the logits of the exit before it.

    Li et al., ICCV 2019, section 3.3, https://arxiv.org/abs/1908.06294

    o_k [B, C] = Linear([p_k, h_k]), h_k [B, d_k] = ReLU(BN(Linear(o_{k-1}))), for the feature p_k [B, d_k] of exit k.

    Example:
        >>> network = exitkit.build_network("msdnet-tiny")
        >>> exitkit.build_strategy("isc").adapt(network)
        >>> type(network.link).__name__
        'KnowledgeLink'
    """

    slots: ClassVar[frozenset[str]] = frozenset({LOGIT_LINK})
    paper: ClassVar[str] = PAPER

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    path: Literal["learned", "identity", "none"] = setting(
        "learned", "how an exit uses the logits of the exit before; none: not at all"
    )
    isc_detach: bool | None = setting(
        None,
        "stop the gradient to the exit before",
        variant={"paper": True, "released": False},
        needs={"path": ("learned", "identity")},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)

    def adapt(self, network: MultiExitNetwork) -> None:
        """Set the link: new classifiers, and the paths between them."""
        assert self.isc_detach is not None  # set by the variant
        link = KnowledgeLink(network.embedding_widths(), network.num_classes, self.path, self.isc_detach)
        network.set_link(link.to(next(network.parameters())))

    def released_names(self) -> Mapping[str, str]:
        """Return the names of the new classifiers, the paths and the frozen network in the authors' files."""
        return {r"link\.answers\.": "classifier.", r"link\.paths\.(\d+)\.": r"isc_modules.\1.", "": "net."}


@dataclass(eq=False)
class OneForAll(TrainingStrategy):
    """One-for-all distillation: every exit but the last also learns from the last one.

    Li et al., ICCV 2019, section 3.4, https://arxiv.org/abs/1908.06294

    L_k [B] = (1 - g) CE(o_k, y) + g T^2 KL(softmax(z_K / T) || softmax(o_k / T)), k < K, for logits [B, C].

    Example:
        >>> exitkit.build_strategy("ofa", variant="released").kd_reduction
        'mean'
    """

    slots: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})
    paper: ClassVar[str] = PAPER

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    gamma: float = setting(
        0.1, "weight of the distillation loss; that of the label loss is 1 - gamma", search=(0.01, 0.9, "log")
    )
    temperature: float = setting(1.0, "T, temperature of both softmaxes")
    kd_reduction: Literal["batchmean", "mean"] | None = setting(
        None,
        "KL divergence, or KL divergence divided by the number of classes",
        variant={"paper": "batchmean", "released": "mean"},
    )
    teacher: Literal["exit", "head"] = setting(
        "exit", "the last exit's output, or the logits of its own head (which a link may replace)"
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
        teacher_losses = [distillation_losses(logits, teacher, self.temperature) for logits in outputs.logits[:-1]]
        return [
            *(
                (1 - self.gamma) * label_loss + share * teacher_loss
                for label_loss, teacher_loss in zip(early, teacher_losses, strict=True)
            ),
            last,
        ]


SOURCES = {"ge": GradientEquilibrium, "isc": InlineCollaboration, "ofa": OneForAll}
"""The methods whose settings `imta` forwards."""


@dataclass(eq=False)
@forwards(GradientEquilibrium, InlineCollaboration, OneForAll, without=("teacher",))
class IMTA(TrainingStrategy):
    """IMTA: Gradient Equilibrium, then ISC and OFA with new classifiers on the frozen network.

    Li et al., ICCV 2019, https://arxiv.org/abs/1908.06294

    Phase 1 trains the network by `first`; phase 2 trains the link's parameters alone, by `second`. The settings of GE,
    ISC and OFA are forwarded to the phase that uses them; see these methods for the formulas.

    Example:
        >>> [(phase.name, phase.epochs) for phase in exitkit.build_strategy("imta").phases(epochs=300, exits=5)]
        [('network', 300), ('classifiers', 180)]
    """

    slots: ClassVar[frozenset[str]] = SLOTS
    paper: ClassVar[str] = PAPER

    variant: Variant = setting("paper", "follow the paper's equations or the released code")
    first: str = setting("ge", "method of the first phase, or several as a+b")
    second: str = setting("isc+ofa", "method of the second phase, on new classifiers; none: no second phase")
    ratio: float = setting(0.6, "length of the second phase, as a multiple of the first", search=(0.2, 1.0))
    batchnorm: Literal["frozen", "train"] | None = setting(
        None, "batch norm of the frozen network", variant={"paper": "frozen", "released": "train"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_variant(self)
        if not (self.ratio > 0 and math.isfinite(self.ratio)):
            raise UserError(f"ratio is {self.ratio}; expected above 0 (the paper's is 0.6 on CIFAR)")
        self.phases(1, 1)  # checks the settings of the phases

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return the settings of methods that are in no phase, and those of a second phase that there is not."""
        parts = method_parts("+".join(name for name in (self.first, self.second) if name != "none"))
        used = {name for part in parts if part in SOURCES for name in forwarded(self, SOURCES[part])}
        unused = {
            name: f"{method} in first or second"
            for method, source in SOURCES.items()
            for name in forwarded(self, source)
            if name not in used | {"variant", "label_smoothing"}
        }
        second = {"ratio": "a second phase", "batchnorm": "a second phase"} if self.second == "none" else {}
        return super().unused_settings(yielded) | unused | second

    def claims(self) -> frozenset[str]:
        """Return the slots that the methods of the two phases claim, and the phases."""
        return frozenset({PHASES}).union(*(phase.strategy.claims() for phase in self.phases(1, 1)))

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the training of the network, and that of the new classifiers on it."""
        network = Phase("network", self._strategy("first", self.first), epochs)
        if self.second == "none":
            return [network]
        second = self._strategy("second", self.second)
        if LOGIT_LINK in network.strategy.claims() & second.claims():
            raise UserError(
                f"first={self.first} and second={self.second} both claim the slot {LOGIT_LINK!r}; change one"
            )
        if LOGIT_LINK not in second.claims():  # new classifiers alone, without paths between them
            second = self._strategy("second", f"isc+{self.second}", {"path": "none"})
        assert self.batchnorm is not None  # set by the variant
        length = max(round(self.ratio * epochs), 1)
        return [network, Phase("classifiers", second, length, train="new", batchnorm=self.batchnorm)]

    def _strategy(self, phase: str, method: str, changed: dict[str, object] | None = None) -> TrainingStrategy:
        """Return the strategy of a phase, with the settings that are forwarded to its methods."""
        settings: dict[str, object] = {"label_smoothing": self.label_smoothing}
        try:
            parts = method_parts(method)
            for part in parts:
                values = forwarded(self, SOURCES[part]) if part in SOURCES else {}
                values |= {"teacher": "head"} if part == "ofa" and phase == "second" else {}
                used = {name: value for name, value in (values | (changed or {})).items() if name in values}
                prefix = f"{part}." if len(parts) > 1 else ""
                settings |= {f"{prefix}{name}": value for name, value in used.items() if name != "label_smoothing"}
            strategy = build_strategy(method, **settings)
        except UserError as error:
            raise UserError(f"{phase} phase of imta: {error}") from None
        if PHASES in strategy.claims():
            raise UserError(f"{phase} is {method}, which has phases of its own; expected a method of one phase")
        return strategy
