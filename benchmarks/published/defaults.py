"""Default fields of runs, for labels and for the comparison with published results."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

from exitkit.errors import UserError

VARIANTS = (None, "paper", "released", "released-channel")


def default_fields(identity: Mapping[str, str]) -> Mapping[str, str]:
    """Return the default fields of a run's method (in its variant), network and data set, {field: JSON value}.

    The result is empty if one of them is not installed.
    """
    variant = next((json.loads(value) for key, value in identity.items() if key.endswith(".variant")), None)
    names = [json.loads(identity[kind]) for kind in ("method", "backbone", "dataset")]
    return _resolved(*names, variant) or _resolved(*names, None)


def published_fields(method: str) -> list[Mapping[str, str]]:
    """Return the fields of a method, {field: JSON value}, per variant: as in its paper or its released code."""
    resolved = [_resolved(method, None, "digits", variant) for variant in VARIANTS]
    return [{key: value for key, value in fields.items() if key.startswith("method.")} for fields in resolved if fields]


def network_fields(backbone: str) -> Mapping[str, str]:
    """Return the default fields of a network, {field: JSON value}; empty if it is not installed."""
    fields = _resolved("joint", backbone, "digits", None)
    return {key: value for key, value in fields.items() if key.startswith("backbone.")}


@functools.cache
def _resolved(method: str, backbone: str | None, dataset: str, variant: str | None) -> Mapping[str, str]:
    # Imported on use: `exitkit watch` must not load torch.
    from exitkit.runs.job import resolve
    from exitkit.runs.recipe import Recipe, flat_identity

    settings = {} if variant is None else {"variant": variant}
    try:
        recipe = resolve(Recipe.make(method=method, method_settings=settings, backbone=backbone, dataset=dataset))
    except UserError:
        return {}
    return flat_identity(recipe)
