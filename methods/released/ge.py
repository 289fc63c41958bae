"""Gradient Equilibrium as Meta-GF's released code places it on shallow-deep networks (VGG and ResNet).

Code: https://github.com/SYVAE/MetaGF. With exits k = 0..K-1 it multiplies the gradient by 1/(K-k) at the *input* of the
unit that bears exit k, and by K-k-1 at its output. These units then receive the plain sum of their exits' gradients,
while all other units receive equation 5 of IMTA. The released WideResNet counts units where it means exits, which gives
factors of zero and negative ones; RANet and MobileNet have no released form. None of these is reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass

from exitkit.networks import GradientTap, MultiExitNetwork, State, map_tensors, rescale

CHAINS = ("sdn-vgg", "sdn-resnet")
"""The families whose released placement is `ReleasedChainTap`."""


@dataclass(frozen=True)
class ReleasedChainTap(GradientTap):
    """Rescales around the unit that bears the exit."""

    def into_last_unit(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply the gradient that leaves the exit-bearing unit backwards by 1/(K-k)."""
        if index == network.num_exits - 1:
            return state
        return map_tensors(lambda tensor: rescale(tensor, 1 / (network.num_exits - index)), state)

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply the gradient that comes from the later stages by K-k-1."""
        return map_tensors(lambda tensor: rescale(tensor, float(network.num_exits - index - 1)), state)
