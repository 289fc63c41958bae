"""The one place that imports torchvision: lazily, and mended where its compiled library does not fit torch.

A torchvision built for another torch (CUDA wheels beside a CPU build of torch, say) fails on import because it adds
rules to operators, `nms` and `qnms`, that its library would have defined. With the two defined beforehand all that
exitkit needs works: data sets, transforms, classification models, feature extraction.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import warnings
from typing import Any

from exitkit.errors import Note, UserError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_MENDED: list[Any] = []  # operator definitions live as long as their library object


@functools.cache
def torchvision(submodule: str = "") -> Any:
    """Return torchvision, or a submodule of it ("datasets", "transforms.v2").

    Raises:
        UserError: it is not installed, or broken beyond the case that can be mended.
    """
    try:
        _import_mended()
        return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"torchvision does not import ({reason}); install the release that fits your torch") from None


def _import_mended() -> None:
    try:
        with warnings.catch_warnings():
            # It warns that its image library does not load, in the very case that is mended below.
            warnings.filterwarnings("ignore", message="Failed to load image Python extension")
            importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # Imported when used: only a torchvision that does not fit torch needs it.
    import sys

    import torch

    # What was imported before the failure must be imported again, once the operators are there.
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + _SCHEMA)
    _MENDED.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        importlib.import_module("torchvision")
    if multiprocessing.parent_process() is None:  # loader workers have had it said by the process that starts them
        warnings.warn(
            "torchvision's compiled library does not fit this torch; "
            "data sets, transforms and models work all the same",
            Note,
            stacklevel=3,
        )
