"""The two released drivers of Meta-GF, as values of the settings in which they differ from the paper.

Code: https://github.com/SYVAE/MetaGF. The layer-wise driver (`released`; MSDNet, ResNet) weights by sigmoid(eta),
normalised over the owners, learns eta in the first epoch only (the tensor is rebound, while the optimiser keeps the old
one), and averages eta with its previous values (0.9). The channel-wise driver (`released-channel`; VGG) has one weight
per output channel, softmax(0.1 eta), with an initial eta of 5 for the last exit, averaged with 0.1. In both, momentum
and batch-norm statistics pass from branch to branch, the other exits' losses have their own factors (for up to 7
exits), the fusion pass uses the ramp of SDN (as do the branches on SDN networks), batch norm is fused like all other
parameters, and the network gets the weights before the last step on eta. The learning rate of eta is constant
(layer-wise) or falls once (channel-wise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exitkit.methods.fusion import Weighting


@dataclass(frozen=True)
class Driver:
    """Settings of a driver in which the paper and the released code differ; the defaults are the paper's.

    Attributes:
        fuse_batchnorm, weighting, fusion_temperature, granularity, ema, learn, clean: defaults of the fields of
            `MetaGF`.
        others: factors of `auxiliary_weight`, one per exit; empty: 1 for all.
        last_eta: initial eta of the last exit; that of the others is 1.
        drops: shares of the schedule after which the learning rate of eta falls to a tenth.
        ramp: whether to use the ramp of SDN in the fusion pass, and on SDN networks in the branches.
        keeps_last_step: whether the network gets the weights after the last step on eta; False: those before it.
    """

    fuse_batchnorm: bool = False
    weighting: Weighting = "softmax"
    fusion_temperature: float = 1.0
    granularity: Literal["tensor", "channel"] = "tensor"
    ema: float = 0.0
    learn: Literal["always", "first"] = "always"
    clean: bool = True
    others: tuple[float, ...] = ()
    last_eta: float = 1.0
    drops: tuple[float, ...] = (0.5, 0.75)
    ramp: bool = False
    keeps_last_step: bool = True


DRIVERS = {
    "paper": Driver(),
    "released": Driver(
        fuse_batchnorm=True,
        weighting="sigmoid",
        ema=0.9,
        learn="first",
        clean=False,
        others=(1.0, 1.0, 0.6, 0.6, 0.75, 0.9, 1.0),
        drops=(),
        ramp=True,
        keeps_last_step=False,
    ),
    "released-channel": Driver(
        fuse_batchnorm=True,
        fusion_temperature=0.1,
        granularity="channel",
        ema=0.1,
        clean=False,
        others=(3.0, 0.6, 0.45, 0.6, 0.75, 0.9, 1.0),
        last_eta=5.0,
        drops=(0.5,),
        ramp=True,
        keeps_last_step=False,
    ),
}
"""The drivers by the value of `MetaGF.variant`."""
