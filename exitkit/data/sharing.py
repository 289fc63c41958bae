"""Images that the processes of a comparison share: read by one of them, stored in a folder, and mapped by all.

The folder is named by an environment variable, which the launcher of the processes sets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from exitkit.data.base import Data, TensorData
from exitkit.data.split import Split
from exitkit.files import SHARED_IMAGES, acquire, exists, load_tensors, read_json, save_tensors, write_json

_FACTS = ("class_names", "input_shape", "mean", "std", "padding")
_TENSORS = ("train_images", "test_images", "train_labels", "test_labels")
_PARTS = ("train", "validation", "test")


def shared(load: Callable[[], Data], name: str) -> Data:
    """Return loaded images; those in memory are stored once and mapped, so that processes share their memory.

    Images that are read on demand are returned as loaded, as are all if the environment variable is not set.

    Args:
        load: reads the images.
        name: anything that determines them.
    """
    folder = os.environ.get(SHARED_IMAGES)
    if not folder:
        return load()
    path = Path(folder) / hashlib.sha256(name.encode()).hexdigest()[:16]
    facts, tensors = path.with_suffix(".json"), path.with_suffix(".safetensors")
    lock = FileLock(path.with_suffix(".lock"))
    acquire(lock)
    with lock:
        if not exists(facts):
            data = load()
            if type(data) is not TensorData:
                return data
            parts = {part: getattr(data.split, part) for part in _PARTS}
            save_tensors(tensors, {name: getattr(data, name) for name in _TENSORS} | parts)
            write_json(facts, {name: getattr(data, name) for name in _FACTS})
    values: dict[str, Any] = read_json(facts)
    values |= {name: tuple(values[name]) for name in ("input_shape", "mean", "std")}
    mapped: dict[str, Any] = load_tensors(tensors)
    split = Split(*(mapped.pop(part) for part in _PARTS))
    return TensorData(split=split, **values, **mapped)
