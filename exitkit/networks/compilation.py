"""Compiled networks: each stage and each head by itself, so that what lies between them stays plain Python."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from exitkit.networks.cascade import Head, Units

if TYPE_CHECKING:
    from exitkit.networks.cascade import MultiExitNetwork


def eagerly() -> AbstractContextManager[None]:
    """Return a context that takes no compiled code: compilers know neither forward mode nor a backward's backward."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def compile_parts(network: MultiExitNetwork) -> None:
    """Have a network's stages and heads compiled in place when they first run; names and weights stay as they are.

    A cascade is compiled in parts since its gradient taps and its logit link differ from method to method, and since
    an early exit stops between two of them. The shapes of a part repeat, so that it is compiled once (and once more for
    the last, smaller batch of an epoch).
    """
    # Imported when used: only compiled networks need it.
    import torch._functorch.config as functorch

    # Compiled code may reuse saved tensors as scratch; several backwards through one graph (aggregators) need them.
    functorch.donated_buffer = False
    for part in _parts(network):
        part.compile()


def _parts(network: MultiExitNetwork) -> list[nn.Module]:
    stages = [unit for stage in network.stages for unit in (stage if isinstance(stage, Units) else [stage])]
    heads = [part for head in network.heads for part in (cast(Head, head).embed, cast(Head, head).classify)]
    return [*stages, *heads]
