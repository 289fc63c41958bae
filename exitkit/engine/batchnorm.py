"""Batch normalisation over the batches of all ranks, on every device (`torch.nn.SyncBatchNorm` supports GPUs only)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from exitkit.engine.ranks import all_reduce
from exitkit.errors import UserError


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = x.clone()
        all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Save nothing: the function is linear."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        summed: Tensor = _SumOverRanks.apply(grads[0])
        return summed

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        summed: Tensor = _SumOverRanks.apply(tangents[0])
        return summed

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _SumOverRanks.apply(x), in_dims[0]


class SyncedBatchNorm(_BatchNorm):
    """Batch normalisation whose training statistics are those of the global batch; evaluation is unchanged."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, ...]; two sums over the ranks: one for the means and one for the variances."""
        if not self.training or not dist.is_initialized():
            plain: Tensor = super().forward(input)
            return plain
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        local = x.new_full((1,), x.numel() // x.shape[1])
        sums = _SumOverRanks.apply(torch.cat([x.sum(dims), local]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = _SumOverRanks.apply((centred * centred).sum(dims)) / count
        if self.track_running_stats:
            self._update_statistics(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normalised: Tensor = centred * scale.view(shape)
        if self.affine:
            normalised = normalised + self.bias.view(shape)
        return normalised.to(input.dtype)

    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, current in ((self.running_mean, mean), (self.running_var, variance)):
            running.add_(momentum * (current.to(running.dtype) - running))  # as `lerp_`, which vmap does not support


class SyncedNormAct(SyncedBatchNorm):
    """The same for timm's `BatchNormAct2d`: batch normalisation, then its modules `drop` and `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and activate [B, C, H, W]."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def synchronise_batchnorm(module: nn.Module) -> None:
    """Replace every batch normalisation inside `module` by a synchronised one; it shares parameters, buffers, hooks.

    Raises:
        UserError: one is of a type of its own, whose computation is not known.
    """
    for name, child in module.named_children():
        if not isinstance(child, _BatchNorm) or isinstance(child, SyncedBatchNorm):
            synchronise_batchnorm(child)
            continue
        with_act = all(isinstance(getattr(child, part, None), nn.Module) for part in ("drop", "act"))
        if type(child) not in _PLAIN and not with_act:
            kind = type(child).__name__
            raise UserError(f"{name} is a {kind}, whose statistics can't be those of all ranks; expected one process")
        synced = (SyncedNormAct if with_act else SyncedBatchNorm)(child.num_features)
        synced.__dict__.update(child.__dict__)
        setattr(module, name, synced)


__all__ = ["SyncedBatchNorm", "synchronise_batchnorm"]
