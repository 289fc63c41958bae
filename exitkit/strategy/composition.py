"""Composition of several methods, and construction of methods from names and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from exitkit import plugins
from exitkit.data.base import Batch
from exitkit.errors import UserError, unknown
from exitkit.networks.cascade import MultiExitNetwork, Outputs
from exitkit.plugins import method_parts
from exitkit.strategy.base import (
    EXIT_WEIGHTS,
    GRADIENT_TAP,
    HOOKS,
    OBJECTIVE,
    PHASES,
    UPDATE,
    LearnedTable,
    Phase,
    TrainingStrategy,
)
from exitkit.strategy.run import Run


class Composition(TrainingStrategy):
    """Several methods as one: each hook is delegated to the part that claims its slot.

    Args:
        parts: the methods by name, as instances with their own field values.

    Raises:
        UserError: two parts claim the same slot, or have different label smoothing.
    """

    # All hooks are overridden, but only to delegate them; see `claims`.
    slots = frozenset(HOOKS.values())

    def __init__(self, parts: Mapping[str, TrainingStrategy]) -> None:
        self.parts = dict(parts)
        claimed: dict[str, str] = {}
        for name, part in self.parts.items():
            for slot in sorted(part.claims() - {GRADIENT_TAP}):
                other = claimed.setdefault(slot, name)
                if slot in self.parts[other].yields:
                    claimed[slot] = name
                elif other != name and slot not in part.yields:
                    raise UserError(
                        f"{other} and {name} can't be composed: both claim the slot {slot!r}; leave one out"
                    )
        smoothing = {part.label_smoothing for part in self.parts.values()}
        if len(smoothing) > 1:
            raise UserError(f"the parts of {'+'.join(self.parts)} have different label_smoothing; expected one value")
        self._base = TrainingStrategy(label_smoothing=smoothing.pop())
        self.label_smoothing = self._base.label_smoothing
        self._claimed = claimed

    def _part(self, slot: str) -> TrainingStrategy:
        return self.parts[self._claimed[slot]] if slot in self._claimed else self._base

    def claims(self) -> frozenset[str]:
        """Return the union of the parts' claims."""
        return frozenset().union(*(part.claims() for part in self.parts.values()))

    def settings(self) -> dict[str, Any]:
        """Return every part's fields, named `part.field`."""
        return {f"{name}.{key}": value for name, part in self.parts.items() for key, value in part.settings().items()}

    def unused_settings(self, yielded: frozenset[str] = frozenset()) -> dict[str, str]:
        """Return every part's fields without effect, named `part.field`."""
        unused: dict[str, str] = {}
        for name, part in self.parts.items():
            left = yielded | {slot for slot in part.claims() & part.yields if self._claimed.get(slot, name) != name}
            unused |= {f"{name}.{key}": needed for key, needed in part.unused_settings(left).items()}
        return unused

    def adapt(self, network: MultiExitNetwork) -> None:
        """Apply every part's adaptation."""
        for part in self.parts.values():
            part.adapt(network)

    def released_names(self) -> Mapping[str, str]:
        """Return every part's names, in the order of the parts."""
        return {name: new for part in self.parts.values() for name, new in part.released_names().items()}

    def prepare(self, run: Run) -> None:
        """Prepare every part."""
        for part in self.parts.values():
            part.prepare(run)

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Return the losses of the part that claims the objective."""
        return self._part(OBJECTIVE).exit_losses(run, outputs, batch)

    def observe(self, run: Run, losses: Sequence[Tensor], batch: Batch) -> None:
        """Pass the losses to every part."""
        for part in self.parts.values():
            part.observe(run, losses, batch)

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Return the sample weights of the part that claims the update."""
        return self._part(UPDATE).sample_weights(run, losses, outputs)

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Return the weights of the part that claims the exit weights."""
        return self._part(EXIT_WEIGHTS).exit_weights(run)

    def train_step(self, run: Run, batch: Batch) -> None:
        """Make the step of the part that claims the update."""
        self._part(UPDATE).train_step(run, batch)

    def train_epoch(self, run: Run, batches: Iterable[Batch]) -> None:
        """Train the epoch with the part that claims the update."""
        self._part(UPDATE).train_epoch(run, batches)

    def teacher_runs(self) -> tuple[str, ...]:
        """Return every part's teachers."""
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.teacher_runs()))

    def refuses(self) -> Mapping[str, str]:
        """Return every part's options."""
        return {key: f"{name}: {why}" for name, part in self.parts.items() for key, why in part.refuses().items()}

    def ingredients(self) -> tuple[str, ...]:
        """Return every part's ingredients."""
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.ingredients()))

    def passes(self, exits: int) -> int:
        """Return the passes of the part that claims the update."""
        return self._part(UPDATE).passes(exits)

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the phases of the part that claims them, each with the whole composition as its strategy."""
        if PHASES not in self._claimed:
            return [Phase("train", self, epochs)]
        owner = self._claimed[PHASES]
        partners = {name: part for name, part in self.parts.items() if name != owner}
        return [
            dataclasses.replace(phase, strategy=Composition({owner: phase.strategy, **partners}))
            for phase in self.parts[owner].phases(epochs, exits)
        ]

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return every part's tables."""
        return [table for part in self.parts.values() for table in part.learned(run)]

    def state_dict(self) -> dict[str, Any]:
        """Return every part's state by its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore every part's state."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def trains_whole_epochs(strategy: TrainingStrategy) -> bool:
    """Whether a method makes no single steps; of a composition, the part that claims the update."""
    while isinstance(strategy, Composition):
        strategy = strategy._part(UPDATE)
    return strategy.whole_epochs


def build_strategy(name: str, **settings: Any) -> TrainingStrategy:
    """Build a training strategy by name, or several as one: `build_strategy("ge+kd")`.

    Args:
        name: a method, as listed by `exitkit list methods`, or several joined by `+`.
        settings: fields of the method; in a composition also as `{"part.field": value}`, which is needed if several
            parts have a field of the same name.

    Raises:
        UserError: a name or field is unknown, a value is impossible, or two parts claim the same slot.
    """
    return configure_strategy(name, settings)


def configure_strategy(name: str, settings: Mapping[str, Any]) -> TrainingStrategy:
    """Build a training strategy as `build_strategy` does, from settings of any names."""
    names = method_parts(name)
    chosen = assign_settings(name, settings)
    parts: dict[str, TrainingStrategy] = {part: plugins.configure("method", part, chosen[part]) for part in names}
    for part, strategy in parts.items():
        if not isinstance(strategy, TrainingStrategy):
            raise UserError(f"method {part!r} is a {type(strategy).__name__}; expected a TrainingStrategy")
    return parts[names[0]] if len(names) == 1 else Composition(parts)


def assign_settings(name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of each part of a (composed) method, as {part: {field: value}}.

    Raises:
        UserError: no part has a field, or several have it and it has no prefix.
    """
    names = method_parts(name)
    common = plugins.fields(TrainingStrategy)
    settable = {part: _settable("method", part) for part in names}
    chosen: dict[str, dict[str, Any]] = {part: {} for part in names}
    for key, value in settings.items():
        prefix, _, field = key.rpartition(".")
        owners = [part for part in names if field in settable[part] and prefix in ("", part)]
        if key in common:  # every method has it, and it applies to all parts
            for part in owners:
                chosen[part][field] = value
            continue
        if not owners:
            known = {field for fields in settable.values() for field in fields} | {
                f"{part}.{field}" for part in names if len(names) > 1 for field in settable[part]
            }
            raise unknown(f"field of method {name}", key, known)
        if len(owners) > 1:
            choices = " or ".join(f"{part}.{field}" for part in owners)
            raise UserError(f"several parts of {name} have a field {field!r}; use {choices}")
        chosen[owners[0]][field] = value
    return chosen


def _settable(kind: str, name: str) -> set[str]:
    plugin = plugins.load(kind, name)
    return {*plugins.fields(plugin), *getattr(plugins.underlying(plugin), "removed", ())}
