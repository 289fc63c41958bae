"""Cost of every exit: multiply-adds and parameters, counted while the network runs stage by stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from exitkit.engine.randomness import seeded_everywhere
from exitkit.errors import UserError
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.compilation import eagerly_counted
from exitkit.networks.copying import copied
from exitkit.networks.inputs import check_cascade, check_shape

aten = torch.ops.aten
Shape = tuple[int, ...]


class ExitCost(NamedTuple):
    """Cost of the prediction for one image at an exit: all that is executed up to it, earlier heads included.

    Attributes:
        exit: number of the exit, from 1.
        papers: the count behind the papers' tables: `macs`, and 1 for each bias of a linear layer, 1 for each input
            of a ReLU, and k*k for each output of a k x k pooling.
        macs: multiply-adds of convolutions and linear layers.
        pruned: `macs` of the network pruned to this exit (`prune_to`): the operations that its prediction depends on.
            Earlier heads are excluded unless a logit link uses their output, as are fine-scale operations that only
            later exits need.
        params: number of parameters of all executed modules; as in the papers, scalar parameters (SDN's mixing
            weights) are not counted.
    """

    exit: int
    papers: int
    macs: int
    pruned: int
    params: int


# Operations that the papers count in addition. FlopCounterMode counts two operations per multiply-add; so do these.
def _linear_with_bias(bias: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * (a[0] * a[1] * b[1] + math.prod(bias))


def _relu(x: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x)


def _pool(x: Shape, kernel: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Max pooling returns values and indices, so that `out_shape` is a pair of shapes.
    values: Shape = out_shape if isinstance(out_shape[0], int) else out_shape[0]
    return 2 * math.prod(values) * math.prod(kernel if len(kernel) == 2 else kernel * 2)


def _global_pool(x: Shape, dims: list[int] | None = None, *_: Any, **__: Any) -> int:
    spatial = len(x) == 4 and dims is not None and sorted(d % 4 for d in dims) == [2, 3]
    return 2 * math.prod(x) if spatial else 0


_PAPERS = {
    aten.addmm: _linear_with_bias,
    aten.relu: _relu,
    aten.relu_: _relu,
    aten.max_pool2d_with_indices: _pool,
    aten.avg_pool2d: _pool,
    aten.mean: _global_pool,
}


def cost(network: MultiExitNetwork, input_shape: tuple[int, int, int] | None = None) -> list[ExitCost]:
    """Count the cost of each exit for one image.

    A copy of the network runs on the `meta` device, so that the network does not change and no memory is allocated; if
    a part of it needs values (control flow that depends on the image), on an image of zeros.

    Args:
        network: the network, adapted by its method; a logit link adds to the cost.
        input_shape: (channels, height, width) of the image; by default the network's `input_shape`.

    Returns:
        one `ExitCost` per exit, first to last.

    Raises:
        UserError: the network is no `MultiExitNetwork`, or the shape is none of images, or none that it takes.
    """
    check_cascade(network)
    shape = network.input_shape if input_shape is None else input_shape
    check_shape(shape)
    try:
        return _counted(copied(network).to("meta"), shape)
    except UserError:
        raise
    except Exception:  # parts that need values, or that can't be moved, raise errors of many types
        if any(parameter.is_meta for parameter in network.parameters()):
            raise
    try:
        return _counted(copied(network), shape)
    except Exception as error:
        if tuple(shape) == tuple(network.input_shape):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the network takes no images of {list(shape)} ({reason}); it was made for {list(network.input_shape)}"
        ) from error


def _counted(network: MultiExitNetwork, shape: tuple[int, int, int]) -> list[ExitCost]:
    """Count the cost of each exit by running the network, which changes, on an image of zeros."""
    network.eval()
    reference = next(network.parameters())
    carry = None
    counts: list[tuple[int, int]] = []
    parameters: list[int] = []
    operations = FlopCounterMode(display=False)
    papers = FlopCounterMode(display=False, custom_mapping=_PAPERS)
    flow = _Flow(operations, network)
    with _counting(reference.device), operations, papers, flow:
        state: Any = torch.zeros(1, *shape, device=reference.device, dtype=_dtype(network))
        for index in range(network.num_exits):
            output, state, carry = network.step(index, state, carry)
            flow.mark(output.logits)
            counts.append((papers.get_total_flops() // 2, operations.get_total_flops() // 2))
            parameters.append(sum(flow.parameters.values()))
    rows = zip(counts, flow.needed(), parameters, strict=True)
    return [ExitCost(index + 1, *count, needed, params) for index, (count, needed, params) in enumerate(rows)]


@contextmanager
def _counting(device: torch.device) -> Iterator[None]:
    """Disable autograd, compilation and fused attention, so that the counters see every operation separately."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            eagerly_counted(),
            seeded_everywhere(device, 0),
            torch.device(device),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Flow(TorchDispatchMode):
    """Records the count of every operation, the earlier operations that produce its inputs, and the parameters read.

    A tensor is identified by its storage, so that views and in-place operations are followed.

    Attributes:
        parameters: {identity: number of elements} of the parameters that operations have read so far.
    """

    def __init__(self, counter: FlopCounterMode, network: nn.Module) -> None:
        super().__init__()
        self.counter = counter
        self.parameters: dict[int, int] = {}
        self.counts: list[int] = []
        self.inputs: list[set[int]] = []
        self.marked: list[int] = []
        self._writer: dict[int, int] = {}
        self._alive: list[Any] = []  # the identity of a freed storage may be used again
        self._sizes = {self._key(parameter): parameter.numel() for parameter in network.parameters() if parameter.dim()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.counts.append((self.counter.get_total_flops() - before) // 2)
        read = [self._key(tensor) for tensor in _tensors((args, kwargs))]
        self.parameters.update({key: self._sizes[key] for key in read if key in self._sizes})
        self.inputs.append({self._writer[key] for key in read if key in self._writer})
        for tensor in _tensors(result):
            self._writer[self._key(tensor)] = len(self.counts) - 1
        return result

    def mark(self, output: Tensor) -> None:
        """Record the operation that produces an exit's output."""
        self.marked.append(self._writer[self._key(output)])

    def needed(self) -> list[int]:
        """Return, for each marked output, the count of all operations that it depends on."""
        return [self._count_needed(operation) for operation in self.marked]

    def _count_needed(self, last: int) -> int:
        needed = {last}
        for operation in range(last, -1, -1):  # an operation comes after those that produce its inputs
            if operation in needed:
                needed |= self.inputs[operation]
        return sum(self.counts[operation] for operation in needed)

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return int(storage._cdata)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
