"""The cascade: a chain of stages with one head each, gradient taps, and one logit link.

    state_i    = stage_i(state_{i-1})                 state_0 = x
    e_i        = head_i.embed(view(state_i))          [B, d_i]
    z_i        = head_i.classify(e_i)                 [B, C]    the head's own logits ("raw")
    y_i, carry = link(i, z_i, e_i, carry)             [B, C]    the exit's output ("logits")

Forward passes, early exit, cost counting and timing all run the chain through `MultiExitNetwork.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from exitkit.errors import UserError

State = Any
"""State between two stages: any pytree of tensors whose first dimension is the batch."""
Carry = Any
"""State of a logit link between two exits: a pytree like `State`, None before the first exit."""


class ExitOutput(NamedTuple):
    """Outputs of one exit: `logits` [B, C], the head's own logits `raw` [B, C], and `embedding` [B, d].

    `features` [B, c, h, w] are the head's features before pooling, where the network keeps them (see
    `MultiExitNetwork.keep_features`).
    """

    logits: Tensor
    raw: Tensor
    embedding: Tensor
    features: Tensor | None = None


class Outputs(NamedTuple):
    """Outputs of all exits, first to last: tuples of K tensors, not stacked: each exit has its own autograd graph."""

    logits: tuple[Tensor, ...]
    raw: tuple[Tensor, ...]
    embeddings: tuple[Tensor, ...]
    features: tuple[Tensor | None, ...] = ()
    carry: Carry = None
    """The logit link's carry after the last exit."""


class Features(NamedTuple):
    """What the heads read of a batch: one tensor [B, ...] per exit, which `forward` accepts in place of images."""

    tensors: tuple[Tensor, ...]


class Head(nn.Module):
    """An exit's classifier in two parts: `embed` (view -> [B, d]) and `classify` ([B, d] -> [B, C]).

    Args:
        embed: the first part.
        classify: the second part.
        before_pooling: how many leading layers of `embed`, an `nn.Sequential`, come before it pools.

    Attributes:
        temperature: a number by which the exit's logits are divided; None: 1.
    """

    def __init__(self, embed: nn.Module, classify: nn.Module, before_pooling: int = 0) -> None:
        super().__init__()
        self.embed = embed
        self.classify = classify
        self.before_pooling = before_pooling
        self.temperature: Tensor | None
        self.register_buffer("temperature", None)

    def features_and_embedding(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features before pooling (the view itself where no layer comes before) and the embedding [B, d]."""
        if not self.before_pooling:
            return view, self.embed(view)
        layers = cast(nn.Sequential, self.embed)
        features: Tensor = layers[: self.before_pooling](view)
        return features, layers[self.before_pooling :](features)

    def layers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the layers of `embed`: the leading ones that have nothing to train and no dropout, and the others."""
        layers = list(self.embed) if isinstance(self.embed, nn.Sequential) else [self.embed]
        fixed = 0
        while fixed < len(layers) and _is_fixed(layers[fixed]):
            fixed += 1
        return layers[:fixed], layers[fixed:]

    def forward(self, view: Tensor) -> Tensor:
        """Return the head's logits [B, C]."""
        logits: Tensor = self.classify(self.embed(view))
        return logits


def _is_fixed(layer: nn.Module) -> bool:
    stateful = any(True for _ in layer.parameters()) or any(True for _ in layer.buffers())
    return not stateful and not any(isinstance(module, _DropoutNd) for module in layer.modules())


class GradientTap:
    """Changes the gradients at the boundary after each stage; the forward pass is the identity.

    Subclasses are frozen dataclasses: equal taps count as one tap.
    """

    def into_last_unit(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Return the input of the last unit of stage `index`, with its gradients changed (see `Units`)."""
        return state

    def to_head(self, network: MultiExitNetwork, index: int, view: Tensor) -> Tensor:
        """Return `view`, the input of head `index`, with its gradient changed."""
        return view

    def onward(self, network: MultiExitNetwork, index: int, state: State) -> State:
        """Return the input of stage `index + 1`, with its gradients changed; not called for the last stage."""
        return state


class LogitLink(nn.Module):
    """Computes the output of an exit from its head and the earlier exits, in training and at inference.

    The base class returns the head's own logits. `config` holds the arguments that the link was made with: two links
    of the same type and config are the same link.
    """

    config: tuple[Any, ...] = ()

    def forward(self, index: int, raw: Tensor, embedding: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """Return the output of exit `index` [B, C], and the carry for the next exit."""
        return raw, carry


class Units(nn.Sequential):
    """A stage of consecutive units; the exit follows the last one, whose input a tap can change."""

    def forward(self, state: State, into_last: Callable[[State], State] = lambda state: state) -> State:
        """Run the units, with `into_last` applied to the input of the last one."""
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
        family: the published family ("msdnet", ...); methods that reproduce released code depend on it.

    Subclasses whose state is not a single tensor override `view` and `with_view`.

    Raises:
        UserError: the numbers of stages and heads differ, or are 0.
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
            raise UserError(f"{len(self.stages)} stages and {len(self.heads)} heads; expected one head per stage")
        self.link: LogitLink = LogitLink()
        self.taps: list[GradientTap] = []
        self.keep_features = False
        """Whether outputs hold the heads' features before pooling; methods that read them set this in `adapt`."""
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
        """Run stage and head `index` (from 0) on the state before it.

        Returns the exit's output, and the state and carry for `step(index + 1, ...)`. A caller that drops finished
        samples must drop their rows from both.
        """
        # Inference mode records no gradients, so that taps have no effect.
        # (A compiler can't query the mode; it removes the taps, which are identities.)
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
        features = None
        if self.keep_features:
            features, embedding = head.features_and_embedding(view)
        else:
            embedding = head.embed(view)
        output, carry = self._answer(index, embedding, features, carry)
        if index < self.num_exits - 1:
            for tap in taps:
                state = tap.onward(self, index, state)
        return output, state, carry

    def _answer(self, index: int, embedding: Tensor, features: Tensor | None, carry: Carry) -> tuple[ExitOutput, Carry]:
        """Return the output of an exit, given the embedding of its head, and the carry for the next exit."""
        head = cast(Head, self.heads[index])
        raw = head.classify(embedding)
        logits, carry = self.link(index, raw, embedding, carry)
        if head.temperature is not None:
            logits = logits / head.temperature
        return ExitOutput(logits, raw, embedding, features), carry

    def _into_last_unit(self, index: int, state: State) -> State:
        for tap in self.taps:
            state = tap.into_last_unit(self, index, state)
        return state

    def iterate(self, x: Tensor) -> Iterator[ExitOutput]:
        """Yield the exits' outputs for images x [B, *input_shape] in order; each is computed when it is requested."""
        state, carry = x, None
        for index in range(self.num_exits):
            output, state, carry = self.step(index, state, carry)
            yield output

    def forward(self, x: Tensor | Features) -> Outputs:
        """Return all exits' outputs for images x [B, *input_shape], or for the features that the heads read of them."""
        carry: Carry = None
        outputs = []
        state: State = x
        for index in range(self.num_exits):
            if isinstance(x, Features):
                output, carry = self._answer_features(index, x.tensors[index], carry)
            else:
                output, state, carry = self.step(index, state, carry)
            outputs.append(output)
        logits, raw, embeddings, features = zip(*outputs, strict=True)
        return Outputs(logits, raw, embeddings, features, carry)

    def features(self, x: Tensor) -> Features:
        """Return what the heads read of images x [B, *input_shape]: `forward` of it gives the outputs of `forward(x)`.

        Leading layers of a head that have nothing to train, such as pooling, are applied, unless outputs hold the
        features before pooling. Gradient taps have no effect: they only change gradients of the stages.
        """
        tensors, state = [], x
        for stage, head in zip(self.stages, self.heads, strict=True):
            state = stage(state)
            tensor = self.view(state)
            for layer in () if self.keep_features else cast(Head, head).layers()[0]:
                tensor = layer(tensor)
            tensors.append(tensor)
        return Features(tuple(tensors))

    def _answer_features(self, index: int, tensor: Tensor, carry: Carry) -> tuple[ExitOutput, Carry]:
        """Return the output of an exit, given its tensor of `Features`."""
        head = cast(Head, self.heads[index])
        features = None
        if self.keep_features:
            features, tensor = head.features_and_embedding(tensor)
        else:
            for layer in head.layers()[1]:
                tensor = layer(tensor)
        return self._answer(index, tensor, features, carry)

    def add_temperatures(self) -> None:
        """Divide the logits of each exit by its head's temperature from now on, which is 1 at first.

        The raw logits do not change, and the logit link gets the logits before the division. Adding temperatures again
        changes nothing.
        """
        reference = next(self.parameters())
        for head in cast(Iterable[Head], self.heads):
            if head.temperature is None:
                head.temperature = torch.ones((), dtype=reference.dtype, device=reference.device)

    def set_temperatures(self, temperatures: Iterable[float]) -> None:
        """Set the K temperatures of the heads, which `add_temperatures` has added."""
        for head, temperature in zip(cast(Iterable[Head], self.heads), temperatures, strict=True):
            assert head.temperature is not None
            head.temperature.fill_(temperature)

    def add_tap(self, tap: GradientTap) -> None:
        """Add a gradient tap; adding an equal one again changes nothing.

        Raises:
            UserError: the network already has a tap of the same type with other settings.
        """
        if tap in self.taps:
            return
        existing = next((other for other in self.taps if type(other) is type(tap)), None)
        if existing is not None:
            raise UserError(f"the network already has {existing}, which contradicts {tap}; use equal settings")
        self.taps.append(tap)

    def set_link(self, link: LogitLink) -> None:
        """Set the logit link; setting an equal one again changes nothing.

        Raises:
            UserError: the network already has another link.
        """
        if type(self.link) is not LogitLink:
            if type(self.link) is type(link) and self.link.config == link.config:
                return
            raise UserError(
                f"the network already has the logit link {type(self.link).__name__}{self.link.config}; "
                f"{type(link).__name__}{link.config} can't be added, expected at most one link"
            )
        self.link = link

    @torch.no_grad()
    def embedding_widths(self) -> list[int]:
        """Return the number of elements of each exit's embedding for one image."""
        reference = next(self.parameters())
        x = torch.zeros(2, *self.input_shape, dtype=reference.dtype, device=reference.device)
        training = [module for module in self.modules() if module.training]
        self.eval()  # batch norm must not update its running statistics
        try:
            return [output.embedding[0].numel() for output in self.iterate(x)]
        finally:
            for module in training:
                module.training = True


def map_tensors(function: Any, state: State) -> State:
    """Apply `function` to every tensor of a state or carry."""
    return pytree.tree_map_only(Tensor, function, state)
