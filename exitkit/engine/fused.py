"""Batch normalisation with its ReLU in one pass over memory, for training in the channels-last layout on CPUs.

PyTorch's kernels for this layout handle one row of channels at a time, which does not fill the vector registers for
the few channels of a dense network, and ReLU is another pass, forward and backward. `batchnorm.c` does both at once.
The machine's C compiler compiles it in every process that needs it, in less than a second; without a compiler,
PyTorch's kernels are used. The results are equal up to rounding.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

_SOURCE = Path(__file__).with_name("batchnorm.c")
_FLAGS = ("-O3", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_FALLBACK_FLAGS = ("-O3", "-shared", "-fPIC")
_COMMANDS = ((*_FLAGS, "-march=native"), (*_FALLBACK_FLAGS, "-mcpu=native"), _FALLBACK_FLAGS)
"""Flags for the instructions of this processor; the first that the compiler accepts are used."""
_DEFINITIONS = {torch.float32: "-DFLOAT", torch.bfloat16: "-DBF16"}
_MAX_THREADS = 4  # the compiled code uses one; with more threads than this, PyTorch's kernels are faster


@cache
def compiled(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return `batchnorm.c` compiled for an element type, or None if it can't be compiled here."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or dtype not in _DEFINITIONS:
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = str(Path(folder) / "batchnorm.so")
        for flags in _COMMANDS:
            command = [compiler, *flags, _DEFINITIONS[dtype], str(_SOURCE), "-o", library]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                return ctypes.CDLL(library)
            except (OSError, subprocess.SubprocessError):
                continue
    return None


def fuse_batchnorm(module: nn.Module) -> None:
    """Replace every batch normalisation in `module`, together with a ReLU that follows it in an `nn.Sequential`.

    Names, parameters and buffers do not change; an identity takes the place of the ReLU. Layers with forward hooks stay
    apart, since a hook may read or change what is between them.
    """
    for name, child in list(module.named_children()):
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, FusedBatchNorm(child))
        else:
            fuse_batchnorm(child)
    if type(module) is nn.Sequential:
        for index, (first, second) in enumerate(pairwise(list(module))):
            if isinstance(first, FusedBatchNorm) and type(second) is nn.ReLU and not is_hooked(first, second):
                first.relu = True
                module[index + 1] = nn.Identity()


def is_hooked(*modules: nn.Module | None) -> bool:
    """Whether one of the modules has forward hooks, which may change what it reads or returns."""
    return any(module is not None and (module._forward_hooks or module._forward_pre_hooks) for module in modules)


class FusedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation, with ReLU if `relu` is set; compiled in training, where the input allows it.

    Args:
        plain: the batch normalisation that it replaces, whose parameters and buffers it shares.
    """

    def __init__(self, plain: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)
        self.relu = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        library = self._library(input)
        if library is None:
            plain = super().forward(input)
            return F.relu(plain) if self.relu else plain
        normalised: Tensor
        normalised, mean, variance = _Normalise.apply(input, self.weight, self.bias, self.eps, self.relu, library)
        if self.track_running_stats:
            self._update_statistics(mean, variance, input.numel() // input.shape[1])
        return normalised

    def _library(self, x: Tensor) -> ctypes.CDLL | None:
        """Return the compiled code, if it can be used for this input."""
        if not self.training or torch.compiler.is_compiling() or torch.get_num_threads() > _MAX_THREADS:
            return None
        if x.device.type != "cpu" or x.dim() != 4 or _is_transformed(x, self.weight) or x.numel() <= x.shape[1]:
            return None
        if not x.is_contiguous(memory_format=torch.channels_last):
            return None
        if self.weight is not None and self.weight.dtype != torch.float32:
            return None
        return compiled(x.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), momentum)


def _is_transformed(*tensors: Tensor | None) -> bool:
    """Whether a tensor has a tangent (forward mode) or belongs to a transform of `torch.func`."""
    return any(
        tensor is not None
        and (
            torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or forward_ad.unpack_dual(tensor).tangent is not None
        )
        for tensor in tensors
    )


class _Normalise(torch.autograd.Function):
    """(x, weight, bias) -> (normalised x, mean [C], variance [C]); the latter two have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, library: ctypes.CDLL
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        y = torch.empty_like(x)
        moments = torch.empty(2, channels, dtype=torch.float64)
        saved = torch.empty(4, channels)
        rows = ctypes.c_long(x.numel() // channels)
        arguments = _pointer(x), _pointer(y), rows, ctypes.c_long(channels), _pointer(weight), _pointer(bias)
        results = _pointer(moments[0]), _pointer(moments[1]), _pointer(saved)
        _check(library.forward(*arguments, ctypes.c_double(eps), ctypes.c_int(relu), *results))
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.eps, ctx.relu, ctx.library = eps, relu, library
        mean, variance = moments.unbind()
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return *_differentiable(ctx, grads[0], x, weight, bias), None, None, None
        gradient = grads[0].contiguous(memory_format=torch.channels_last)
        channels = x.shape[1]
        dx = torch.empty_like(x)
        slopes = torch.empty(2, channels)
        rows = ctypes.c_long(x.numel() // channels)
        arguments = _pointer(gradient), _pointer(x), _pointer(dx), rows, ctypes.c_long(channels), ctypes.c_int(ctx.relu)
        _check(ctx.library.backward(*arguments, _pointer(saved), _pointer(slopes[0]), _pointer(slopes[1])))
        dweight, dbias = (None, None) if weight is None else slopes.unbind()
        return dx, dweight, dbias, None, None, None


def _differentiable(ctx: Any, gradient: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return the gradients with respect to (x, weight, bias) with a graph, by PyTorch's kernels."""
    x, weight, bias = tensors
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)  # type: ignore[arg-type]
    y = F.relu(y) if ctx.relu else y
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in tensors]


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _check(allocated: int) -> None:
    if not allocated:
        raise MemoryError("no memory for batch normalisation")
