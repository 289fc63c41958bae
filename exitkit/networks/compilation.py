"""Compilation of each stage and each head by torch.compile; gradient taps and the logit link remain plain Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from exitkit.networks.cascade import Head, Units

if TYPE_CHECKING:
    from exitkit.networks.cascade import MultiExitNetwork


def eagerly() -> AbstractContextManager[None]:
    """Return a context without compiled code: torch.compile supports neither forward mode nor double backward."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def eagerly_counted() -> Iterator[None]:
    """Disable compiled code, as `eagerly` does, for a count of operations by PyTorch's counter.

    The counter registers hooks for all modules, and a part that `torch.compile` has wrapped warns that hooks run once
    more for its wrapper, which changes no count.
    """
    with eagerly(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks", UserWarning)
        yield


def compile_parts(network: MultiExitNetwork) -> None:
    """Compile a network's stages and heads in place, when they first run; names and weights do not change.

    The parts are compiled separately because gradient taps and the logit link differ between methods, and because
    early exit stops between two stages. Input shapes repeat, so that a part is compiled once, and once more for the
    smaller last batch of an epoch.
    """
    # Imported when used: only compiled networks need it.
    import torch._functorch.config as functorch

    # Compiled code may overwrite saved tensors, but aggregators need several backward passes through one graph.
    functorch.donated_buffer = False
    for part in _parts(network):
        part.compile()


def _parts(network: MultiExitNetwork) -> list[nn.Module]:
    stages = [unit for stage in network.stages for unit in (stage if isinstance(stage, Units) else [stage])]
    heads = [part for head in network.heads for part in (cast(Head, head).embed, cast(Head, head).classify)]
    return [*stages, *heads]
