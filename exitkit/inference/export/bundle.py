"""What makes an export complete: preprocessing as data, operating points, example images, versions and digests."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exitkit.data.base import Data, TensorData
from exitkit.data.lazy import LazyData
from exitkit.errors import UserError
from exitkit.files import write_json
from exitkit.inference.choose import at_budgets, outcome_of_outputs, stored_embeddings
from exitkit.inference.export import runner
from exitkit.inference.laplace import Laplace
from exitkit.inference.outputs import ExitOutputs
from exitkit.inference.policy import PLAIN, ExitPolicy, read_policy
from exitkit.inference.rule import ExitRule
from exitkit.inference.rules.base import Validation
from exitkit.runs.folder import RunFolder

Outputs = Mapping[str, Any]
"""`logits` [N, K, C] and `labels` [N] of one part, as arrays."""

SCRIPTS = {"runner.py": "run.py", "service.py": "serve.py"}
"""Files of this package, and their names in an export."""
EXAMPLES = 8
POINTS = 8
"""Operating points in a bundle, from the lowest to the highest cost, besides the chosen one."""
NOISE = 1e-2
"""Changes of the logits, in units of the largest one, under which an example should keep its class and its exit."""
_CHANGES = 20
LICENCE = (
    "run.py and serve.py are part of exitkit (MIT licence); for the programs, the licences of the training data and of "
    "pretrained weights hold"
)
_PACKAGES = ("exitkit", "torch", "onnx", "onnxruntime", "numpy")


def about(run: RunFolder, data: Data) -> dict[str, Any]:
    """Return what policy.json says besides the policy: preprocessing, class names, run, and the costs of the exits."""
    channels = data.input_shape[0]
    # Images that are used as the data set gives them are not normalised.
    mean, std = getattr(data, "mean", (0.0,) * channels), getattr(data, "std", (1.0,) * channels)
    return {
        "mean": list(mean),
        "std": list(std),
        "preprocessing": preprocessing(data),
        "run": run.path.name,
        "class_names": list(data.class_names),
        "costs": run.costs(),
    }


def preprocessing(data: Data) -> dict[str, Any] | None:
    """Return how an image file becomes an input of the network, as the runner reads it; see `runner.preprocessed`.

    Images of a data set of one size are not resized in training; a file of another size is, so that it covers theirs.

    Returns:
        None if the data set transforms its images itself, so that the runner can't.
    """
    channels, height, width = data.input_shape
    if channels not in (1, 3):
        return None
    if isinstance(data, LazyData):
        chosen = data.preprocessing
        if chosen is None:
            return None
        resize, interpolation = round(chosen.size / chosen.crop), chosen.interpolation
    elif isinstance(data, TensorData):
        resize, interpolation = height if height == width else 0, "bilinear"
    else:
        return None
    return {
        "colour": "L" if channels == 1 else "RGB",
        "resize": resize,
        "interpolation": interpolation,
        "crop": [height, width],
        "scale": "divided by 255, minus mean, divided by std, per channel",
        "layout": "NCHW",
    }


def of_programs(
    run: RunFolder, chosen: ExitRule | ExitPolicy, policy: str | None
) -> tuple[ExitRule | ExitPolicy, str | None, tuple[Outputs, Outputs]]:
    """Return the policy that decides on the outputs of a run's exported programs, its name, and the stored outputs.

    They are the run's own, unless the policy's combination becomes a part of the programs (`ExitPolicy.placed_in`).

    Args:
        run: the run.
        chosen: the policy that is exported.
        policy: its name; None: an exit rule.

    Returns:
        the policy, its name, and the logits [N, K, C] and labels [N] of validation and test.
    """
    if not isinstance(chosen, ExitPolicy) or not isinstance(chosen.combination, Laplace) or policy is None:
        return chosen, policy, (run.outputs("validation"), run.outputs("test"))
    combination = chosen.combination

    def combined(part: str) -> Outputs:
        stored = run.outputs(part)
        logits = combination(ExitOutputs(stored["logits"], stored_embeddings(run, part)))
        return {"logits": logits, "labels": stored["labels"]}

    name = str(replace(read_policy(policy), combination=PLAIN))
    return ExitPolicy(chosen.rule), name, (combined("validation"), combined("test"))


def operating_points(
    chosen: ExitRule | ExitPolicy,
    validation: Outputs,
    measured: Outputs,
    costs: Sequence[float],
    *,
    policy: str | None = None,
    score: str | None = None,
    calibrated: bool = False,
    **_: Any,
) -> list[dict[str, Any]]:
    """Return a table of operating points, from the lowest to the highest cost; the chosen one is called default.

    Args:
        chosen: the exported policy.
        validation: logits [N, K, C] and labels [N] of the validation images, on which thresholds are chosen.
        measured: those of the images that say what is expected, the test images.
        costs: multiply-adds up to each exit, [K].
        policy, score, calibrated: what `exitkit export` was given.

    Returns:
        rows of `name`, `cost`, `accuracy`, `shares` and `images` on the measured images, and `policy`, the keys of
        policy.json that differ.
    """
    # Rounded up: the first budget must not be below the first exit's cost.
    shares = np.ceil(100 * np.linspace(costs[0] / costs[-1], 1, POINTS) - 1e-9).astype(int)
    names = [f"{share}%" for share in dict.fromkeys(shares.tolist())]
    checked = Validation.checked(validation["logits"], validation["labels"], costs)
    policies = at_budgets(checked, names, policy, score or "confidence", calibrated)
    logits, labels = (torch.from_numpy(np.asarray(measured[key])) for key in ("logits", "labels"))
    rows = []
    for name, at_budget in ({"default": chosen} | policies).items():
        got = outcome_of_outputs(at_budget, logits, labels, costs)
        found = {key: got[key] for key in ("cost", "accuracy", "shares")}
        rows.append({"name": name, **found, "images": len(labels), "policy": json.loads(at_budget.to_json())})
    return sorted(rows, key=lambda row: (row["cost"], row["name"]))


def complete(folder: Path, images: np.ndarray) -> dict[str, Any]:
    """Add the runner, the example images, the versions and the digests to the programs and policy.json of a folder.

    Args:
        folder: the export; its programs and its policy.json are there.
        images: normalised images, float32 [N, *input_shape], from which the examples are taken.

    Returns:
        the content of policy.json.
    """
    for source, name in SCRIPTS.items():
        shutil.copyfile(Path(runner.__file__).with_name(source), folder / name)
    policy: dict[str, Any] = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    exported = runner.Runner(folder)
    stored = _as_bytes(images, policy)
    logits = logits_by_stage(exported, exported.checked(stored))
    rows = _examples(exported, logits)
    outputs, exits = exported(exported.checked(stored[rows]))
    np.save(folder / "examples.npy", stored[rows])
    policy["examples"] = {"classes": outputs.argmax(1).tolist(), "exits": (exits + 1).tolist()}
    if policy.get("preprocessing"):
        _write_picture(folder / "example.png", stored[rows[0]])
    write_json(folder / "policy.json", policy)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    write_json(
        folder / "manifest.json",
        {
            "licence": LICENCE,
            "versions": versions(),
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        },
    )
    return policy


def versions() -> dict[str, str]:
    """Return the versions of Python, exitkit and the packages that wrote the programs."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # torch-export needs no onnx
            continue
    return found


def _as_bytes(images: np.ndarray, policy: dict[str, Any]) -> np.ndarray:
    """Return normalised images as uint8 if they were normalised from uint8, else as they are."""
    if policy.get("preprocessing") is None:
        return images
    mean, std = (np.array(policy[key]).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    pixels = 255 * (images * std + mean)
    if np.abs(pixels - pixels.round()).max() > 0.01:
        raise UserError("the images are no normalised bytes, so that files of images would be read wrongly")
    stored: np.ndarray = pixels.round().astype(np.uint8)
    return stored


def logits_by_stage(exported: runner.Runner, images: np.ndarray) -> np.ndarray:
    """Return the logits [N, K, C] of the stage programs, run one after the other on all images."""
    state, logits = [images], []
    for program in exported.programs:
        output, *state = program(state)
        logits.append(output)
    return np.stack(logits, 1)


def _examples(exported: runner.Runner, logits: np.ndarray) -> list[int]:
    """Return the images that serve as examples: of every exit in turn, those whose exit and class are most certain."""
    generator = np.random.default_rng(0)
    classes, exits = _decided(exported, logits)
    kept = np.zeros(len(logits))
    size = NOISE * np.abs(logits).max()
    for _ in range(_CHANGES):
        changed = logits + size * generator.uniform(-1, 1, logits.shape).astype(logits.dtype)
        changed_classes, changed_exits = _decided(exported, changed)
        kept += (changed_classes == classes) & (changed_exits == exits)
    queues = [sorted(np.flatnonzero(exits == index), key=lambda row: -kept[row]) for index in sorted(set(exits))]
    rows: list[int] = []
    while len(rows) < min(EXAMPLES, len(logits)):
        for queue in queues:
            rows += [int(queue.pop(0))] if queue and len(rows) < EXAMPLES else []
    return rows


def _decided(exported: runner.Runner, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return class and exit [N] of images, from the logits [N, K, C] of all exits."""
    classes, exits, memory = np.zeros(len(logits), int), np.full(len(logits), -1), None
    for index in range(logits.shape[1]):
        outputs, leaves, memory = runner.decide(exported.policy, index, logits[:, index], memory)
        first = leaves & (exits < 0)
        classes[first], exits[first] = outputs.argmax(1)[first], index
    return classes, exits


def _write_picture(path: Path, pixels: np.ndarray) -> None:
    # Imported when used: only image files need Pillow.
    from PIL import Image

    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)
