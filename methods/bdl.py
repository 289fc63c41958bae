"""Block-dependent losses: each stage is trained on the losses of the next few exits only.

Paper: Han et al., Improving Low-Latency Predictions in Multi-Exit Neural Networks via Block-Dependent Losses, IEEE
Transactions on Neural Networks and Learning Systems 2023, https://doi.org/10.1109/TNNLS.2023.3282249

With exits k = 0..K-1, their weights a_k (all 1) and mean losses L_k, window w and gradients g of stage i and head k:

    g(stage i) = sum_{k = i}^{min(i + w, K) - 1} a_k dL_k   (+ a_{K-1} dL_{K-1} with `final`, if k does not reach it)
    g(head k)  = a_k dL_k

With `groups`, stages are divided into groups of consecutive stages, and exit k trains the stages of its group up to k:
joint training inside a group. A logit link and side networks are trained by every exit that reads them.

What differs from the published code (https://github.com/savertm/Block-Dependent-Losses-for-Multi-Exit-Networks): it
runs blocks again on detached inputs, which gives the same gradients, but updates batch norm's statistics up to four
times per batch; here they are updated once. It uses w = 3 on CIFAR (7 exits) and w = 2 on ImageNet (5 exits); its
other modes are `window = 1` ("local error") and `groups = 3,4` without `final` ("no overlap"). Its self-distillation is
the composition with kd and joint (the page of this method gives the settings).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from torch import Tensor

from exitkit.networks import MultiExitNetwork
from exitkit.strategy import UPDATE, Batch, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class BlockDependentLosses(TrainingStrategy):
    """Block-dependent losses: exit k trains its head and the last few stages before it; the last exit trains all.

    Han et al., IEEE Transactions on Neural Networks and Learning Systems 2023,
    https://doi.org/10.1109/TNNLS.2023.3282249

    For the parameters theta_i [D_i] of stage i: g_i = sum_k dL_k / dtheta_i over the exits k = i..i+w-1 and K-1, each
    counted once, where exits k = 0..K-1 have the losses L_k = mean_i CE(z_k,i, y_i) for logits z_k [B, C] and labels
    y [B].

    Example:
        >>> strategy = exitkit.build_strategy("bdl", window=2)
        >>> [list(strategy.trained_stages(index, exits=4)) for index in range(4)]
        [[0], [0, 1], [1, 2], [0, 1, 2, 3]]
    """

    slots: ClassVar[frozenset[str]] = frozenset({UPDATE})
    paper: ClassVar[str] = (
        "Han et al., Improving Low-Latency Predictions in Multi-Exit Neural Networks via Block-Dependent Losses, "
        "TNNLS 2023"
    )

    window: int = setting(
        3, "stages that an exit trains, its own and those before it", search=(1, 5), needs={"groups": (None,)}
    )
    final: bool = setting(True, "let the last exit train all stages")
    groups: tuple[int, ...] | None = setting(
        None, "numbers of stages per group, first to last: exits train the stages of their group, instead of a window"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise UserError(f"window is {self.window}; expected at least 1 (the paper's is 3 on CIFAR)")
        if self.groups is not None and not (self.groups and min(self.groups) > 0):
            raise UserError(f"groups is {self.groups}; expected numbers of at least 1")

    def adapt(self, network: MultiExitNetwork) -> None:
        """Check that the groups contain all stages; the network does not change."""
        if self.groups is not None and sum(self.groups) != network.num_exits:
            raise UserError(f"groups is {self.groups}; expected a sum of {network.num_exits}, the number of exits")

    def trained_stages(self, index: int, exits: int) -> range:
        """Return the stages that exit `index` trains, in a network of `exits` exits."""
        if self.final and index == exits - 1:
            return range(exits)
        if self.groups is None:
            return range(max(0, index - self.window + 1), index + 1)
        return range(max(start for start in (0, *accumulate(self.groups)) if start <= index), index + 1)

    def train_step(self, run: Run, batch: Batch) -> None:
        """Make one step on the sum of the exits' gradients, each over the parameters that the exit trains."""
        parameters, names = run.parameters, defaultdict[int, list[str]](list)
        for name, parameter in run.network.named_parameters(remove_duplicate=False):  # stages may share parameters
            names[id(parameter)].append(name)
        total: list[Tensor | None] = [None] * len(parameters)
        for index, (loss, weight) in enumerate(zip(run.losses(batch), run.weights(), strict=True)):
            stages = self.trained_stages(index, run.network.num_exits)
            trained = [place for place, p in enumerate(parameters) if _trains(index, stages, names[id(p)])]
            if not weight or not trained:
                continue
            gradients = run.gradients(loss.mean() * weight, [parameters[place] for place in trained])
            for place, gradient in zip(trained, gradients, strict=True):
                earlier = total[place]
                if gradient is not None:
                    total[place] = gradient if earlier is None else earlier + gradient
        run.apply(total)


def _trains(index: int, stages: Collection[int], names: Iterable[str]) -> bool:
    """Whether exit `index` trains a parameter of these names; every exit trains those outside stages and heads."""
    parts = [name.split(".") for name in names]
    inside = {(part[0], int(part[1])) for part in parts if part[0] in ("stages", "heads")}
    trained = {("heads", index), *(("stages", stage) for stage in stages)}
    return not inside or bool(inside & trained)
