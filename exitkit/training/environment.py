"""Versions, device and machine with which a run begins, as stored in `environment.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exitkit import plugins
from exitkit.data.lazy import LazyData
from exitkit.engine.engine import Engine
from exitkit.runs.fingerprints import code_digest
from exitkit.runs.job import Job, images_digest


def environment(job: Job, engine: Engine) -> dict[str, Any]:
    """Return the content of `environment.json`."""
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    return {
        "exitkit": version("exitkit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(engine.device),
        "gpu": gpu,
        "processor": _processor(),
        "ranks": engine.ranks.world,
        "layout": "channels-last" if engine.placement.channels_last else "contiguous",
        "fused_batchnorm": engine.fuses_batchnorm,
        "code": code_digest(job.recipe.method),
        "images": images_digest(job.recipe),
        "parameters": sum(parameter.numel() for parameter in job.network.parameters()),
        "input_shape": list(job.data.input_shape),
        "num_classes": job.data.num_classes,
        "preprocessing": _preprocessing(job),
        "class_names": list(job.data.class_names),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _preprocessing(job: Job) -> dict[str, Any] | None:
    """Return the transform of the images, and where it comes from; None for images of one size."""
    if not isinstance(job.data, LazyData) or job.data.preprocessing is None:
        return None
    recipe, chosen = job.recipe, job.data.preprocessing
    network = plugins.configure("backbone", recipe.backbone, recipe.backbone_settings).preprocessing()
    source = {None: "data set", chosen: "network"}.get(network, "settings")
    return dataclasses.asdict(chosen) | {"source": source}


def _processor() -> str:
    """Return the name of the processor, if the system provides it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
