"""Multiply-adds and parameters of every exit, counted while the chain runs stage by stage."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from exitkit.networks.cascade import MultiExitNetwork

aten = torch.ops.aten
Shape = tuple[int, ...]


class ExitCost(NamedTuple):
    """What it costs to answer one image at an exit: everything executed up to it, earlier heads included.

    Attributes:
        exit: number of the exit, from 1.
        papers: the count behind the papers' tables: `macs`, and 1 for each bias of a linear layer, 1 for each input
            of a ReLU, and k*k for each output of a k x k pooling.
        macs: multiply-adds of convolutions and linear layers.
        pruned: the `macs` of the network cut at this exit (`prune_to`): only what its answer depends on. Left out are
            the earlier heads, but for those that a logit link carries on, and fine-scale work for later exits.
        params: parameters of all modules executed; as in the papers' count, without single mixing weights (SDN).
    """

    exit: int
    papers: int
    macs: int
    pruned: int
    params: int


# What the papers' convention adds. The counter counts operations, two a multiply-add, and so do these.
def _linear_with_bias(bias: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * (a[0] * a[1] * b[1] + math.prod(bias))


def _relu(x: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x)


def _pool(x: Shape, kernel: list[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Max pooling gives two tensors, values and indices; its shape is then a pair of shapes.
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
    """Count what each exit costs, for one image.

    A copy of the network without storage runs on an image without storage, so that nothing of the network changes
    and ImageNet sizes cost no memory.

    Args:
        network: the network, with whatever links a method has put into it.
        input_shape: (channels, height, width); by default what the network was built for.

    Returns:
        one `ExitCost` an exit, first to last.
    """
    ghost = copy.deepcopy(network).to("meta").eval()
    state: Any = torch.empty(1, *(input_shape or network.input_shape), device="meta", dtype=_dtype(network))
    carry = None
    counts: list[tuple[int, int]] = []
    parameters: list[int] = []
    operations = FlopCounterMode(display=False)
    papers = FlopCounterMode(display=False, custom_mapping=_PAPERS)
    flow = _Flow(operations)
    with _counting(), _executed_parameters(ghost) as executed, operations, papers, flow:
        for index in range(network.num_exits):
            output, state, carry = ghost.step(index, state, carry)
            flow.mark(output.logits)
            counts.append((papers.get_total_flops() // 2, operations.get_total_flops() // 2))
            parameters.append(sum(executed.values()))
    rows = zip(counts, flow.needed(), parameters, strict=True)
    return [ExitCost(index + 1, *count, needed, params) for index, (count, needed, params) in enumerate(rows)]


@contextmanager
def _counting() -> Iterator[None]:
    """Have every operation come to the counters by itself: none recorded for gradients, none fused away."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Flow(TorchDispatchMode):
    """Records of every operation how much it counts, and which earlier operations its inputs come from.

    A tensor is known by its storage, so that views and in-place operations are followed, too.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.counts: list[int] = []
        self.inputs: list[set[int]] = []
        self.marked: list[int] = []
        self._writer: dict[int, int] = {}
        self._alive: list[Any] = []  # a storage that were freed could give its identity to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.counts.append((self.counter.get_total_flops() - before) // 2)
        sources = (self._writer.get(self._key(tensor)) for tensor in _tensors((args, kwargs)))
        self.inputs.append({source for source in sources if source is not None})
        for tensor in _tensors(result):
            self._writer[self._key(tensor)] = len(self.counts) - 1
        return result

    def mark(self, answer: Tensor) -> None:
        """Note which operation gave an exit's answer."""
        self.marked.append(self._writer[self._key(answer)])

    def needed(self) -> list[int]:
        """Return the counts of all that each marked answer depends on."""
        return [self._behind(operation) for operation in self.marked]

    def _behind(self, last: int) -> int:
        wanted = {last}
        for operation in range(last, -1, -1):  # operations come after what they read
            if operation in wanted:
                wanted |= self.inputs[operation]
        return sum(self.counts[operation] for operation in wanted)

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return int(storage._cdata)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _executed_parameters(network: nn.Module) -> Iterator[dict[int, int]]:
    """Collect {identity: size} of the parameters of every module that runs."""
    seen: dict[int, int] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        seen.update({id(p): p.numel() for p in module.parameters(recurse=False) if p.dim()})

    handles = [module.register_forward_pre_hook(note) for module in network.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
