"""Heads alone: the exits of a network whose trunk is fixed, such as a pretrained one.

Paper: none of its own; Kaya et al., Shallow-Deep Networks, ICML 2019, section 5 ("IC-only training"),
https://arxiv.org/abs/1810.07052, compares it with training of the whole network.

With the features f_k(x) of a fixed trunk at exits k = 1..K, and heads h_k with parameters theta_k,

    L(theta) = sum_k w_k mean_i CE(h_k(f_k(x_i); theta_k), y_i)

The trunk is in evaluation mode: without dropout, and with batch normalisation's running statistics, which do not
change. Every objective, link and update that composes with joint training composes with it (`heads+ofa`, `heads+isc`).
`heads+ztw` trains the cascade of Zero Time Waste by the recipe's optimiser, rate and epochs; with `last = false` the
last head is kept, as in its second phase.

With `views = 0` images are read without augmentation, and with `views = V` as V augmented views: epoch e sees view
e mod V. Their features are then computed once, and an epoch runs the heads only. With `views = none` images are
augmented anew, and the trunk runs, in every epoch.

After the last epoch the logits of each exit are divided by a temperature (Guo et al., On Calibration of Modern Neural
Networks, ICML 2017, section 4.2, https://arxiv.org/abs/1706.04599) that is fitted on the validation images, so that the
confidences of all exits mean the same.

What differs from the code of shallow-deep networks: it augments the images in every epoch (`views = none`), trains with
Adam, leaves the batch normalisation of the fixed trunk in training mode, and does not calibrate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from exitkit.networks import MultiExitNetwork, owners
from exitkit.strategy import PHASES, FrozenTrunk, Phase, Run, TrainingStrategy, UserError, setting


@dataclass(eq=False)
class Heads(TrainingStrategy):
    """Heads alone, on a fixed trunk: for pretrained networks, in minutes on a CPU.

    "IC-only training" of Kaya et al., ICML 2019, https://arxiv.org/abs/1810.07052

    L = sum_{k=1..K} mean_i CE(h_k(f_k,i), y_i), minimised over the heads h_k, for features f_k [B, ...] of the fixed
    trunk; then h_k / T_k, with the temperatures T [K] that minimise the same loss on validation images.

    Example:
        >>> (phase,) = exitkit.build_strategy("heads").phases(epochs=20, exits=4)
        >>> phase.train, phase.trunk.views
        (('heads.', 'link.'), 0)
    """

    slots: ClassVar[frozenset[str]] = frozenset({PHASES})
    paper: ClassVar[str] = "IC-only training of Kaya et al., Shallow-Deep Networks, ICML 2019"

    views: int | None = setting(
        0, "augmented views of each image, computed once; 0: the image itself; none: a new view in every epoch"
    )
    last: bool = setting(True, "train the last head, too; false: keep that of the pretrained network")
    calibrate: bool = setting(True, "divide each exit's logits by a temperature fitted on the validation images")
    cache: bool = setting(True, "compute the trunk's features once and store them while training", execution=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views is not None and self.views < 0:
            raise UserError(f"views is {self.views}; expected at least 0, or none")

    def adapt(self, network: MultiExitNetwork) -> None:
        """Add the temperatures, which are 1 until the phase ends."""
        if self.calibrate:
            network.add_temperatures()

    def prepare(self, run: Run) -> None:
        """Check that `last=false` keeps the last exit: the link of another method may replace its head."""
        last = run.network.num_exits - 1
        if not self.last and any(name.startswith("link.") and last in by for name, by in owners(run.network).items()):
            raise UserError(
                "last=false keeps the last head, and a link of another method replaces it; expected last=true"
            )

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the training of the heads; with `last=false` those of all exits but the last."""
        kept = range(exits - (not self.last))
        trained = ("heads.",) if self.last else tuple(f"heads.{index}." for index in kept)
        trunk = FrozenTrunk(self.views, self.cache)
        return [Phase("heads", self, epochs, (*trained, "link."), "frozen", trunk=trunk, calibrate=self.calibrate)]
