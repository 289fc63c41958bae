"""What the fields of a run would be by default: what stands out in a label, and what makes a method the published."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

from exitkit.errors import UserError

VARIANTS = (None, "paper", "released", "released-channel")


def default_fields(identity: Mapping[str, str]) -> Mapping[str, str]:
    """Return the fields, flat, that a run of these names (and of its method's variant) has if none is set.

    Empty where a name is not installed here.
    """
    variant = next((json.loads(value) for key, value in identity.items() if key.endswith(".variant")), None)
    names = [json.loads(identity[kind]) for kind in ("method", "backbone", "dataset")]
    return _resolved(*names, variant) or _resolved(*names, None)


def published_fields(method: str) -> list[Mapping[str, str]]:
    """Return the fields of a method, flat, in each variant that it has: as its paper says, as its code does."""
    found = [_resolved(method, None, "digits", variant) for variant in VARIANTS]
    return [{key: value for key, value in fields.items() if key.startswith("method.")} for fields in found if fields]


def network_fields(backbone: str) -> Mapping[str, str]:
    """Return the fields of a network of this name, flat; empty where it is not installed here."""
    fields = _resolved("joint", backbone, "digits", None)
    return {key: value for key, value in fields.items() if key.startswith("backbone.")}


@functools.cache
def _resolved(method: str, backbone: str | None, dataset: str, variant: str | None) -> Mapping[str, str]:
    # Imported when used: `exitkit watch` reads names without torch.
    from exitkit.runs.job import resolve
    from exitkit.runs.recipe import Recipe, flat_identity

    settings = {} if variant is None else {"variant": variant}
    try:
        recipe = resolve(Recipe.make(method=method, method_settings=settings, backbone=backbone, dataset=dataset))
    except UserError:
        return {}
    return flat_identity(recipe)
