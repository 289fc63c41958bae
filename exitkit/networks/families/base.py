"""What a backbone is: settings, and a `build` that makes the cascade for an image size and a number of classes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from exitkit.networks.cascade import MultiExitNetwork
from exitkit.plugins import underlying

Home = tuple[tuple[int, int, int], int]
"""The images and classes that a network was published for: ((channels, height, width), classes)."""


IMAGENET: Home = ((3, 224, 224), 1000)


@dataclass(frozen=True)
class Backbone:
    """A family of networks; its fields are the structure, its presets are other defaults for them.

    Class attributes:
        home: the images and classes to assume where no data set says otherwise.
        presets: the family's presets by name; see `preset`.
    """

    home: ClassVar[Home] = ((3, 32, 32), 100)
    presets: ClassVar[dict[str, functools.partial[Backbone]]] = {}

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network for images of `input_shape` and `num_classes` classes.

        Raises:
            UserError: settings that make no network for such images.
        """
        raise NotImplementedError


def preset(
    family: type[Backbone], doc: str, home: Home | None = None, *, name: str | None = None, **defaults: Any
) -> functools.partial[Backbone]:
    """Return `family` with other defaults.

    Args:
        family: the backbone whose preset it is.
        doc: one line that says what it is, with the paper's table.
        home: the images and classes that it was published for; by default the family's.
        name: registers the preset with the family under this name, so that the family's entry point is enough to find
            it. A name that begins with the family's is found without loading other packages. Without a name the preset
            needs an entry point of its own.
        defaults: the fields that differ from the family's.
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
    """Return the images and classes that a backbone or preset was published for."""
    known: Home = getattr(plugin, "home", None) or underlying(plugin).home
    return known
