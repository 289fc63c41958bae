"""Copies of modules, also of those that hold tensors which `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
from types import CellType, FunctionType
from typing import TypeVar

from torch import Tensor, nn

from exitkit.errors import UserError

Copied = TypeVar("Copied")


def copied(module: Copied, memo: dict[int, object] | None = None) -> Copied:
    """Return a deep copy of a module, or of a tuple of modules that share parts.

    Tensors with a gradient history are copied without it: `torch.nn.utils.weight_norm` and `spectral_norm` keep the
    weight of the last forward pass, and compute it anew in the next one. What hooks fill is copied with them.

    Args:
        module: a module, or a tuple of modules.
        memo: {identity of an object: its copy}, as for `copy.deepcopy`.

    Raises:
        UserError: something that the module holds can't be copied.
    """
    memo = dict(memo or {})
    for part in _parts(module):
        computed = [value for value in vars(part).values() if isinstance(value, Tensor) and not value.is_leaf]
        memo.update({id(value): value.detach().clone() for value in computed if id(value) not in memo})
    try:
        result = copy.deepcopy(module, memo)
        for part in _parts(result):
            _copy_hooks(part, memo)
        return result
    except Exception as error:  # an object's own __deepcopy__ and __reduce__ may raise any error
        name = type(module[0] if isinstance(module, tuple) else module).__name__
        reason = " ".join(str(error).split())
        raise UserError(f"{name} can't be copied ({reason}); expected a module that copy.deepcopy accepts") from error


def _parts(module: object) -> set[nn.Module]:
    roots = module if isinstance(module, tuple) else (module,)
    return {part for root in roots if isinstance(root, nn.Module) for part in root.modules()}


def _copy_hooks(module: nn.Module, memo: dict[int, object]) -> None:
    """Give the hooks of a copy their own copies of the objects in their closures, such as lists that they fill."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        for number, hook in hooks.items():
            if isinstance(hook, FunctionType) and hook.__closure__:
                cells = tuple(CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in hook.__closure__)
                copied = FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, cells)
                copied.__kwdefaults__ = hook.__kwdefaults__
                copied.__dict__.update(hook.__dict__)
                hooks[number] = copied
