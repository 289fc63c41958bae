"""What a backbone is: settings, and a `build` that makes the cascade for an image size and a number of classes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from exitkit.plugins import underlying

if TYPE_CHECKING:
    from exitkit.network import MultiExitNetwork

Home = tuple[tuple[int, int, int], int]
"""The images and classes that a network was published for: ((channels, height, width), classes)."""


IMAGENET: Home = ((3, 224, 224), 1000)


@dataclass(frozen=True)
class Backbone:
    """A family of networks; its fields are the structure, its presets `functools.partial`s with other defaults.

    Class attributes:
        home: the images and classes to assume where no data set says otherwise.
    """

    home: ClassVar[Home] = ((3, 32, 32), 100)

    def build(self, input_shape: tuple[int, int, int], num_classes: int) -> MultiExitNetwork:
        """Build the network for images of `input_shape` and `num_classes` classes.

        Raises:
            UserError: settings that make no network for such images.
        """
        raise NotImplementedError


def preset(family: type[Backbone], doc: str, home: Home | None = None, **defaults: Any) -> functools.partial[Backbone]:
    """Return `family` with other defaults; `doc` says in a line what it is, with the paper's table."""
    made = functools.partial(family, **defaults)
    made.doc = f"{doc.rstrip('.')}."  # type: ignore[attr-defined]
    made.home = home or family.home  # type: ignore[attr-defined]
    return made


def home(plugin: Any) -> Home:
    """Return the images and classes that a backbone or preset was published for."""
    found: Home = getattr(plugin, "home", None) or underlying(plugin).home
    return found
