"""Optional libraries of pretrained networks, imported when they are used."""

from __future__ import annotations

import importlib
import textwrap
from typing import Any

from exitkit.data.torchvision_import import torchvision
from exitkit.errors import UserError


def library(name: str, submodule: str = "") -> Any:
    """Return a library, or a submodule of it, that exitkit's extra of the same name installs.

    Args:
        name: "timm" or "transformers".
        submodule: "models" for `timm.models`.

    Raises:
        UserError: it is not installed, or fails on import.
    """
    torchvision()  # they import it: what keeps it from loading is mended or reported here
    try:
        return importlib.import_module(f"{name}.{submodule}" if submodule else name)
    except ImportError as error:
        if error.name == name:
            raise UserError(f"{name} is not installed; pip install 'exitkit[{name}]'") from None
        raise UserError(f"{name} does not import ({shortened(error)})") from None


def shortened(error: Exception, width: int = 160) -> str:
    """Return another library's error message in one line of at most `width` characters."""
    return textwrap.shorten(" ".join(str(error).split()), width, placeholder=" ...")
