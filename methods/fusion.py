"""Fusion of parameters over branches: a weighted mean of end points, per tensor or per channel.

A learned parameter p has rows (one, or one per output channel); row r of it is  sum_e w[r, e] W_e[p]_r  with weights
w [R, K] that sum to 1 over the exits that own p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from exitkit.strategy import LearnedTable

Weighting = Literal["softmax", "sigmoid"]


class FusionWeights(nn.Module):
    """eta: one number per row and exit; a row is a parameter tensor, or one output channel of it.

    Args:
        owned_by: the exits that own each of the R rows.
        exits: K.
        weighting: `softmax` of temperature * eta over the owners, or `sigmoid` of it, normalised over them.
        temperature: factor of eta.
        last: initial eta of the last exit; that of the others is 1.
    """

    def __init__(
        self,
        owned_by: Sequence[Sequence[int]],
        exits: int,
        weighting: Weighting = "softmax",
        temperature: float = 1.0,
        last: float = 1.0,
    ) -> None:
        super().__init__()
        owns = torch.zeros(len(owned_by), exits, dtype=torch.bool)
        for row, owners in enumerate(owned_by):
            owns[row, list(owners)] = True
        eta = torch.ones(len(owned_by), exits)
        eta[:, -1] = last
        self.weighting, self.temperature = weighting, temperature
        self.eta = nn.Parameter(eta)
        self.owns: Tensor
        self.register_buffer("owns", owns)

    def forward(self) -> Tensor:
        """Return the weights [R, K]: they sum to 1 over each row's owners, and are 0 for other exits."""
        scaled = self.temperature * self.eta
        if self.weighting == "softmax":
            return scaled.masked_fill(~self.owns, -torch.inf).softmax(1)
        strength = scaled.sigmoid() * self.owns
        return strength / strength.sum(1, keepdim=True)


class Fusion:
    """Fuses the end points of K branches into one set of parameters.

    Args:
        exits: K.
        owners: the exits whose output reads each parameter.
        rows: number of rows of each learned parameter; all others are fused with equal weights.
    """

    def __init__(self, exits: int, owners: Mapping[str, Sequence[int]], rows: Mapping[str, int]) -> None:
        self._exits, self._owners, self._rows = exits, owners, rows

    def weights(self, weighting: Weighting, temperature: float, last: float) -> FusionWeights:
        """Return the module that gives the weights of all rows."""
        owned_by = [self._owners[name] for name, rows in self._rows.items() for _ in range(rows)]
        return FusionWeights(owned_by, self._exits, weighting, temperature, last)

    def stack(self, endpoints: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the stacked end points [K, *shape] of each learned parameter, and the fused values of all others.

        The latter are means of the end points over the owners: over one exit, over all branches if no exit owns the
        parameter (it is not trained, and equal in all), or over several exits if the fusion is not learned.
        """
        stacks = {name: torch.stack([end[name] for end in endpoints]) for name in self._rows}
        fixed = {
            name: torch.stack([endpoints[exit][name] for exit in exits or range(len(endpoints))]).mean(0)
            for name, exits in self._owners.items()
            if name not in stacks
        }
        return stacks, fixed

    def fuse(self, weights: Tensor, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the learned parameters, fused with weights [R, K]."""
        fused = {}
        pieces = weights.split([self._rows[name] for name in stacks])
        for (name, stack), rows in zip(stacks.items(), pieces, strict=True):
            if len(rows) == 1:
                flat = torch.mv(stack.reshape(len(stack), -1).t(), rows[0])
            else:
                flat = (stack.reshape(*stack.shape[:2], -1) * rows.t().unsqueeze(2)).sum(0)
            fused[name] = flat.view(stack.shape[1:])
        return fused

    def tables(self, weights: Tensor) -> list[LearnedTable]:
        """Return the weights [R, K] as a table: each exit's mean weight in each layer."""
        layers: dict[str, list[Tensor]] = {}
        for name, piece in zip(self._rows, weights.split(list(self._rows.values())), strict=True):
            owned = torch.tensor([exit in self._owners[name] for exit in range(self._exits)])
            mean = piece.mean(0).cpu().masked_fill(~owned, torch.nan)
            layers.setdefault(name.rpartition(".")[0], []).append(mean)
        means = [torch.stack(tensors).nanmean(0).tolist() for tensors in layers.values()]
        values = [[None if value != value else value for value in row] for row in means]
        exits = [f"exit {number}" for number in range(1, self._exits + 1)]
        return [LearnedTable("fusion weights, layer by layer", list(layers), exits, values)] if layers else []
