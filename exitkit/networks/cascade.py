"""The cascade: stages in a chain, a head at each, gradient taps and one logit link between them.

    state_i    = stage_i(state_{i-1})                 state_0 = x
    e_i        = head_i.embed(view(state_i))          [B, d_i]
    z_i        = head_i.classify(e_i)                 [B, C]    the head's own logits ("raw")
    y_i, carry = link(i, z_i, e_i, carry)             [B, C]    the exit's output ("logits")

Whole forward passes, early exit, cost and timing all run this one chain through `MultiExitNetwork.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from exitkit.errors import UserError

State = Any
"""What one stage hands to the next: any pytree of tensors whose first dimension is the batch."""
Carry = Any
"""What a logit link remembers from one exit to the next: a pytree like `State`, None before the first exit."""


class ExitOutput(NamedTuple):
    """What one exit gives: `logits` [B, C] (the output), `raw` [B, C] (the head's own), `embedding` [B, d]."""

    logits: Tensor
    raw: Tensor
    embedding: Tensor


class Outputs(NamedTuple):
    """What all exits give, first to last, each a tuple of K tensors (never stacked: exits differ in their graphs)."""

    logits: tuple[Tensor, ...]
    raw: tuple[Tensor, ...]
    embeddings: tuple[Tensor, ...]


class Head(nn.Module):
    """An exit's classifier in two parts: `embed` (view -> [B, d]) and `classify` ([B, d] -> [B, C])."""

    def __init__(self, embed: nn.Module, classify: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.classify = classify

    def forward(self, view: Tensor) -> Tensor:
        """Return the head's logits [B, C]."""
        logits: Tensor = self.classify(self.embed(view))
        return logits


class GradientTap:
    """Changes how gradients flow at the boundary behind each stage; an identity forward.

    Subclasses are frozen dataclasses: two taps that compare equal are one tap.
    """

    def into_last_unit(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Return what the last unit of stage `index` reads, with its gradients changed (see `Units`)."""
        return state

    def to_head(self, network: MultiExitNetwork, index: int, view: Tensor) -> Tensor:
        """Return `view`, the tensor that head `index` reads, with its gradient changed."""
        return view

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Return the state that stage `index + 1` reads, with its gradients changed (never called at the last)."""
        return state


class LogitLink(nn.Module):
    """Decides how an exit's output uses the exits before it; stays at inference. This one uses none of them.

    `config` is what the link was made from: two links of one type and one config are the same link.
    """

    config: tuple[Any, ...] = ()

    def forward(self, index: int, raw: Tensor, embedding: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Return the output of exit `index` [B, C] and what the next exit's link needs."""
        return raw, carry


class Units(nn.Sequential):
    """A stage made of units in a row; the last one bears the exit, and a tap can reach in before it."""

    def forward(self, state: State, into_last: Callable[[State], State] = lambda state: state) -> State:
        """Run the units, with `into_last` applied to what the last one reads."""
        *before, last = self
        for unit in before:
            state = unit(state)
        return last(into_last(state))


class MultiExitNetwork(nn.Module):
    """A chain of stages with one head each.

    Args:
        stages: K modules, state -> state; the first reads the images [B, *input_shape].
        heads: K heads, each reading `view(state)`.
        input_shape: (channels, height, width) of one image.
        num_classes: width C of every exit's logits.
        family: which published family this is ("msdnet", ...): methods that copy a released quirk ask for it.

    Subclasses whose state is not a single tensor override `view` and `with_view`.
    """

    def __init__(
        self,
        stages: Iterable[nn.Module],
        heads: Iterable[Head],
        input_shape: tuple[int, int, int],
        num_classes: int,
        family: str = "custom",
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(heads)
        if len(self.stages) != len(self.heads) or not self.heads:
            raise UserError(f"a cascade needs one head a stage: {len(self.stages)} stages, {len(self.heads)} heads")
        self.link: LogitLink = LogitLink()
        self.taps: list[GradientTap] = []
        self.input_shape = input_shape
        self.num_classes = num_classes
        self.family = family

    @property
    def num_exits(self) -> int:
        """K, the number of exits."""
        return len(self.heads)

    def view(self, state: State) -> Tensor:
        """Return the tensor of `state` that a head reads."""
        tensor: Tensor = state
        return tensor

    def with_view(self, state: State, tensor: Tensor) -> State:
        """Return `state` with the tensor that a head reads replaced by `tensor`."""
        return tensor

    def step(self, index: int, state: State, carry: Carry = None) -> tuple[ExitOutput, State, Carry]:
        """Run stage and head `index` on the state before it.

        Returns the exit's output, and the state and carry for `step(index + 1, ...)`. Whoever drops finished samples
        drops their rows of both.
        """
        # Inference mode records no gradient of either kind, so nothing can flow back for a tap to change.
        # (A compiler can't ask which mode it is in; it compiles the taps, which are identities, away.)
        taps = self.taps if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() else ()
        stage = self.stages[index]
        if taps and isinstance(stage, Units):
            state = stage(state, lambda into: self._into_last_unit(index, into))
        else:
            state = stage(state)
        view = self.view(state)
        for tap in taps:
            view = tap.to_head(self, index, view)
        head = cast(Head, self.heads[index])
        embedding = head.embed(view)
        raw = head.classify(embedding)
        logits, carry = self.link(index, raw, embedding, carry)
        if index < self.num_exits - 1:
            for tap in taps:
                state = tap.onward(self, index, state)
        return ExitOutput(logits, raw, embedding), state, carry

    def _into_last_unit(self, index: int, state: State) -> State:
        for tap in self.taps:
            state = tap.into_last_unit(self, index, state)
        return state

    def iterate(self, x: Tensor) -> Iterator[ExitOutput]:
        """Yield the exits' outputs one by one; nothing is computed for an exit before it is asked for."""
        state, carry = x, None
        for index in range(self.num_exits):
            output, state, carry = self.step(index, state, carry)
            yield output

    def forward(self, x: Tensor) -> Outputs:
        """Return all exits' outputs for images x [B, *input_shape]."""
        logits, raw, embeddings = zip(*self.iterate(x), strict=True)
        return Outputs(logits, raw, embeddings)

    def add_tap(self, tap: GradientTap) -> None:
        """Add a gradient tap; adding an equal one again changes nothing.

        Raises:
            UserError: a tap of the same kind with other settings is there already.
        """
        if tap in self.taps:
            return
        twin = next((other for other in self.taps if type(other) is type(tap)), None)
        if twin is not None:
            raise UserError(f"the network has {twin} already, and {tap} contradicts it; use one setting for both")
        self.taps.append(tap)

    def set_link(self, link: LogitLink) -> None:
        """Set the logit link; setting an equal one again changes nothing.

        Raises:
            UserError: another link is there already (a network takes one).
        """
        if type(self.link) is not LogitLink:
            if type(self.link) is type(link) and self.link.config == link.config:
                return
            raise UserError(
                f"the network's logit link is {type(self.link).__name__}{self.link.config} already, "
                f"{type(link).__name__}{link.config} can't be added: a network takes one"
            )
        self.link = link

    @torch.no_grad()
    def embedding_widths(self) -> list[int]:
        """Return how many numbers each exit's embedding has for one image."""
        reference = next(self.parameters())
        x = torch.zeros(2, *self.input_shape, dtype=reference.dtype, device=reference.device)
        training = [module for module in self.modules() if module.training]
        self.eval()  # batch norm must not move its statistics
        try:
            return [output.embedding[0].numel() for output in self.iterate(x)]
        finally:
            for module in training:
                module.training = True


def map_tensors(function: Any, state: State) -> State:
    """Apply `function` to every tensor of a state or carry."""
    return pytree.tree_map_only(Tensor, function, state)
