"""Several methods as one, and methods made from names and settings."""

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
    """Several methods as one: each hook goes to the part that claims its slot.

    Args:
        parts: the methods by name, as instances with their own field values.

    Raises:
        UserError: two parts claim one slot (named), or a part is itself a schedule of several phases.
    """

    # Delegation, not a claim: what a composition claims is what its parts claim.
    slots = frozenset(HOOKS.values())

    def __init__(self, parts: Mapping[str, TrainingStrategy]) -> None:
        self.parts = dict(parts)
        claimed: dict[str, str] = {}
        for name, part in self.parts.items():
            for slot in sorted(part.claims() - {GRADIENT_TAP}):
                if slot in claimed:
                    raise UserError(
                        f"{claimed[slot]} and {name} can't be composed: both claim the slot {slot!r}; leave one out"
                    )
                claimed[slot] = name
        smoothing = {part.label_smoothing for part in self.parts.values()}
        if len(smoothing) > 1:
            raise UserError(f"the parts of {'+'.join(self.parts)} have different label_smoothing; give all the same")
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

    def adapt(self, network: MultiExitNetwork) -> None:
        """Apply every part's adaptation."""
        for part in self.parts.values():
            part.adapt(network)

    def released_names(self) -> Mapping[str, str]:
        """Return every part's names, in the order of the parts."""
        return {ours: theirs for part in self.parts.values() for ours, theirs in part.released_names().items()}

    def prepare(self, run: Run) -> None:
        """Prepare every part."""
        for part in self.parts.values():
            part.prepare(run)

    def exit_losses(self, run: Run, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """Ask the part that claims the objective."""
        return self._part(OBJECTIVE).exit_losses(run, outputs, batch)

    def observe(self, run: Run, losses: Sequence[Tensor], batch: Batch) -> None:
        """Let every part see the losses."""
        for part in self.parts.values():
            part.observe(run, losses, batch)

    def sample_weights(self, run: Run, losses: Sequence[Tensor], outputs: Outputs) -> Tensor | None:
        """Ask the part that claims the update."""
        return self._part(UPDATE).sample_weights(run, losses, outputs)

    def exit_weights(self, run: Run) -> Sequence[float]:
        """Ask the part that claims the exit weights."""
        return self._part(EXIT_WEIGHTS).exit_weights(run)

    def train_step(self, run: Run, batch: Batch) -> None:
        """Let the part that claims the update make the step."""
        self._part(UPDATE).train_step(run, batch)

    def train_epoch(self, run: Run, batches: Iterable[Batch]) -> None:
        """Let the part that claims the update train the epoch."""
        self._part(UPDATE).train_epoch(run, batches)

    def teachers(self) -> tuple[str, ...]:
        """Return every part's teachers."""
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.teachers()))

    def ingredients(self) -> tuple[str, ...]:
        """Return every part's ingredients."""
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.ingredients()))

    def passes(self, exits: int) -> int:
        """Return the passes of the part that claims the update."""
        return self._part(UPDATE).passes(exits)

    def phases(self, epochs: int, exits: int) -> list[Phase]:
        """Return the phases of the part that claims them, each ruled by the whole composition."""
        if PHASES not in self._claimed:
            return [Phase("train", self, epochs)]
        ruler = self._claimed[PHASES]
        partners = {name: part for name, part in self.parts.items() if name != ruler}
        return [
            dataclasses.replace(phase, strategy=Composition({ruler: phase.strategy, **partners}))
            for phase in self.parts[ruler].phases(epochs, exits)
        ]

    def learned(self, run: Run) -> list[LearnedTable]:
        """Return every part's tables."""
        return [table for part in self.parts.values() for table in part.learned(run)]

    def state_dict(self) -> dict[str, Any]:
        """Return every part's state by its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every part its state back."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def build_strategy(name: str, **settings: Any) -> TrainingStrategy:
    """Build a training strategy by name, or several as one: `build_strategy("ge+kd")`.

    Args:
        name: a method as `exitkit list methods` shows them, or several joined by `+`.
        settings: any of its fields; in a composition also as `{"part.field": value}`, which is needed where two
            parts have a field of the same name.

    Raises:
        UserError: unknown name or field, a bad value, or parts that claim the same slot.
    """
    names = method_parts(name)
    chosen = assign_settings(name, settings)
    parts: dict[str, TrainingStrategy] = {part: plugins.configure("method", part, chosen[part]) for part in names}
    for part, strategy in parts.items():
        if not isinstance(strategy, TrainingStrategy):
            raise UserError(f"method {part!r} is a {type(strategy).__name__}; expected a TrainingStrategy")
    return parts[names[0]] if len(names) == 1 else Composition(parts)


def assign_settings(name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Say which part of a (composed) method each setting belongs to.

    Returns {part: {field: value}}.

    Raises:
        UserError: a field that no part has, or that several have without a prefix saying which is meant.
    """
    names = method_parts(name)
    common = plugins.fields(TrainingStrategy)
    having = {part: _settable("method", part) for part in names}
    chosen: dict[str, dict[str, Any]] = {part: {} for part in names}
    for key, value in settings.items():
        prefix, _, field = key.rpartition(".")
        homes = [part for part in names if field in having[part] and prefix in ("", part)]
        if key in common:  # every method has it, and all parts are meant
            for part in homes:
                chosen[part][field] = value
            continue
        if not homes:
            known = {field for fields in having.values() for field in fields} | {
                f"{part}.{field}" for part in names if len(names) > 1 for field in having[part]
            }
            raise unknown(f"field of method {name}", key, known)
        if len(homes) > 1:
            choices = " or ".join(f"{part}.{field}" for part in homes)
            raise UserError(f"several parts of {name} have a field {field!r}; say {choices}")
        chosen[homes[0]][field] = value
    return chosen


def _settable(kind: str, name: str) -> set[str]:
    plugin = plugins.load(kind, name)
    return {*plugins.fields(plugin), *getattr(plugins.underlying(plugin), "removed", ())}
