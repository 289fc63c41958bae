"""Gradient Equilibrium as Meta-GF's released code places it on shallow-deep networks (VGG and ResNet).

Code: https://github.com/SYVAE/MetaGF. With exits k = 0..K-1 it multiplies the gradient by 1/(K-k) at the *input* of the
unit before exit k, and by K-k-1 at its output. These units then receive the sum of their exits' gradients, while all
other units receive equation 5 of IMTA. The released code for WideResNet uses indices of units in place of exits, which
gives zero and negative factors; for RANet and MobileNet there is none. None of these is reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass

from exitkit.networks import GradientTap, MultiExitNetwork, State, map_tensors, rescale

CHAINS = ("sdn-vgg", "sdn-resnet")
"""Families whose released placement is `ReleasedChainTap`."""


@dataclass(frozen=True)
class ReleasedChainTap(GradientTap):
    """Rescales the gradients at the input and the output of the unit before each exit."""

    def into_last_unit(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply the gradient of the input of the unit before the exit by 1/(K-k)."""
        if index == network.num_exits - 1:
            return state
        return map_tensors(lambda tensor: rescale(tensor, 1 / (network.num_exits - index)), state)

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Multiply the gradient from the later stages by K-k-1."""
        return map_tensors(lambda tensor: rescale(tensor, float(network.num_exits - index - 1)), state)
