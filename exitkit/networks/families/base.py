"""Base class of the backbones: settings, and a `build` method that makes the cascade."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from exitkit.data.preprocessing import Preprocessing
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.plugins import underlying

Home = tuple[tuple[int, int, int], int]
"""Image shape and number of classes that a network was published for: ((channels, height, width), classes)."""


IMAGENET: Home = ((3, 224, 224), 1000)


@dataclass(frozen=True)
class Backbone:
    """A family of networks; its fields define the structure, and its presets change their defaults.

    Class attributes:
        home: image shape and number of classes to use if no data set gives them.
        presets: the family's presets by name; see `preset`.
    """

    home: ClassVar[Home] = ((3, 32, 32), 100)
    presets: ClassVar[dict[str, functools.partial[Backbone]]] = {}

    def preprocessing(self) -> Preprocessing | None:
        """Return how the images of the network's own weights were prepared; None: it has no weights of its own.

        Data sets of images of any size take what their settings leave open from it.
        """
        return None

    def weights_files(self) -> tuple[str, ...]:
        """Return the files and folders of the network's initial weights; their content is part of a run's identity."""
        return ()

    def without_weights(self) -> Self:
        """Return the same network with random initial weights, for weights that replace them at once."""
        return self

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network for images of `input_shape` and `num_classes` classes.

        Raises:
            UserError: the settings give no valid network for such images.
        """
        raise NotImplementedError


def preset(
    family: type[Backbone], doc: str, home: Home | None = None, *, name: str | None = None, **defaults: Any
) -> functools.partial[Backbone]:
    """Return `family` with other defaults.

    Args:
        family: the backbone of the preset.
        doc: description in one line, with the paper's table.
        home: image shape and number of classes that it was published for; by default the family's.
        name: name under which the preset is registered with the family, so that the family's entry point is enough to
            find it. A name that begins with the family's is found without loading other packages. A preset without a
            name needs its own entry point.
        defaults: fields whose defaults differ from the family's.
    """
    made = functools.partial(family, **defaults)
    made.doc = f"{doc.rstrip('.')}."  # type: ignore[attr-defined]
    made.home = home or family.home  # type: ignore[attr-defined]
    if name is not None:
        if "presets" not in vars(family):
            family.presets = {}
        family.presets[name] = made
    return made


def home(plugin: Any) -> Home:
    """Return the image shape and the number of classes that a backbone or preset was published for."""
    known: Home = getattr(plugin, "home", None) or underlying(plugin).home
    return known
