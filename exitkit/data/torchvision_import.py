"""Lazy import of torchvision, with a workaround if its compiled library does not fit torch.

A torchvision built for another torch (such as CUDA wheels with a CPU build of torch) fails on import, because it adds
rules to the operators `nms` and `qnms`, which its library would have defined. If both are defined beforehand, all that
exitkit needs works: data sets, transforms, classification models and feature extraction.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import warnings
from typing import Any

from exitkit.errors import Note, UserError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_LIBRARIES: list[Any] = []  # operator definitions exist as long as their library object


@functools.cache
def torchvision(submodule: str = "") -> Any:
    """Return torchvision, or a submodule of it ("datasets", "transforms.v2").

    Raises:
        UserError: torchvision is not installed, or fails on import for another reason.
    """
    try:
        _import_with_workaround()
        return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"torchvision does not import ({reason}); install the release that fits your torch") from None


def _import_with_workaround() -> None:
    try:
        with warnings.catch_warnings():
            # It warns that its image library does not load in the case that is worked around below.
            warnings.filterwarnings("ignore", message="Failed to load image Python extension")
            importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # Imported when used: only the workaround needs them.
    import sys

    import torch

    # Modules imported before the failure must be imported again after the operators are defined.
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + _SCHEMA)
    _LIBRARIES.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        importlib.import_module("torchvision")
    if multiprocessing.parent_process() is None:  # workers of a loader do not repeat it
        warnings.warn(
            "torchvision's compiled library does not fit this torch; data sets, transforms and models still work",
            Note,
            stacklevel=3,
        )
