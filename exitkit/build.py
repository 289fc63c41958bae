"""Networks, strategies and data sets made from names and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exitkit import plugins
from exitkit.errors import UserError, unknown

if TYPE_CHECKING:
    from exitkit.backbones.base import Backbone
    from exitkit.data.base import DataSet
    from exitkit.network import MultiExitNetwork
    from exitkit.strategy import TrainingStrategy


_TOO_LARGE = ("allocate memory", "Overflow", "out of memory", "Storage size calculation overflowed")
"""What torch says of sizes that no machine, or not this one, has room for."""


def build_network(
    name: str,
    *,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    **settings: Any,
) -> MultiExitNetwork:
    """Build a network by the name of its backbone.

    Args:
        name: a backbone or preset, as `exitkit list backbones` shows them.
        num_classes: width of the logits; by default what the preset was published for.
        input_shape: (channels, height, width) of the images; by default what the preset was published for.
        settings: any fields of the backbone.

    Raises:
        UserError: unknown name or field, or settings that make no network.
    """
    from exitkit.backbones.base import home

    backbone: Backbone = plugins.configure("backbone", name, settings)
    home_shape, home_classes = home(plugins.load("backbone", name))
    classes = home_classes if num_classes is None else num_classes
    if classes < 2:
        raise UserError(f"num_classes is {classes}; expected at least 2")
    try:
        return backbone.build(input_shape or home_shape, classes)
    except (MemoryError, RuntimeError, TypeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _TOO_LARGE):
            raise
        raise UserError(
            f"backbone {name} does not fit into memory with these settings; expected smaller ones"
        ) from None


def build_strategy(name: str, **settings: Any) -> TrainingStrategy:
    """Build a training strategy by name, or several as one: `build_strategy("ge+kd")`.

    Args:
        name: a method as `exitkit list methods` shows them, or several joined by `+`.
        settings: any of its fields; in a composition also as `{"part.field": value}`, which is needed where two
            parts have a field of the same name.

    Raises:
        UserError: unknown name or field, a bad value, or parts that claim the same slot.
    """
    from exitkit.strategy import Composition, TrainingStrategy

    names = method_parts(name)
    chosen = assign_settings(name, settings)
    parts: dict[str, TrainingStrategy] = {part: plugins.configure("method", part, chosen[part]) for part in names}
    for part, strategy in parts.items():
        if not isinstance(strategy, TrainingStrategy):
            raise UserError(f"method {part!r} is a {type(strategy).__name__}; expected a TrainingStrategy")
    return parts[names[0]] if len(names) == 1 else Composition(parts)


def build_dataset(name: str, settings: Mapping[str, Any]) -> DataSet:
    """Return the description of a data set; its `load` reads the images."""
    dataset: DataSet = plugins.configure("dataset", name, settings)
    return dataset


def method_parts(name: str) -> list[str]:
    """Split `a+b` into its methods.

    Raises:
        UserError: an empty part, an unknown one, or one named twice.
    """
    names = [part.strip() for part in name.split("+")]
    known = plugins.registered("method")
    for part in names:
        if part not in known:
            raise unknown("method", part, known)
    if len(set(names)) < len(names):
        raise UserError(f"method {name!r} names a part twice; each part counts once")
    return names


def assign_settings(name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Say which part of a (composed) method each setting belongs to.

    Returns {part: {field: value}}.

    Raises:
        UserError: a field that no part has, or that several have without a prefix saying which is meant.
    """
    from exitkit.strategy import TrainingStrategy

    names = method_parts(name)
    common = plugins.fields(TrainingStrategy)
    having = {part: plugins.fields(plugins.load("method", part)) for part in names}
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
