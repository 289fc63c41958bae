"""Runs an exported network with early exit: a stage is computed only for the images that have not left before it.

usage: python run.py IMAGES.npy

Prints the number, the predicted class and the exit of each image.

IMAGES.npy: an array [N, C, H, W] written by numpy.save; C, H and W are `input_shape` in policy.json. Either uint8
images (0 to 255), which this program normalises, or floats that are already normalised: each channel divided by 255,
minus its `mean`, divided by its `std` (both in policy.json).

Needs numpy, and onnxruntime or (for torch-export) torch; exitkit itself is not needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Program = Callable[[list[Any]], list[Any]]


def load(path: Path) -> Program:
    """Return one exported program: a list of arrays -> a list of arrays."""
    # Imported when used: a folder needs onnxruntime or torch, not both.
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        names = [node.name for node in session.get_inputs()]
        return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))
    import torch

    module = torch.export.load(path).module()
    return lambda arrays: [output.detach().numpy() for output in module(*map(torch.from_numpy, arrays))]


def exit_scores(logits: Any, score: str) -> Any:
    """Return the score of each sample at an exit, [N], from its logits [N, C]; patience is not among these scores."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    if score == "confidence":
        return p.max(1)
    if score == "margin":
        return np.diff(np.sort(p, 1)[:, -2:], axis=1)[:, 0]
    return 1 + (p * np.log(np.maximum(p, 1e-300))).sum(1) / np.log(p.shape[1])


class Runner:
    """An exported network and its exit policy, read from a folder."""

    def __init__(self, folder: Path) -> None:
        self.policy = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        self.programs = [load(folder / name) for name in self.policy["programs"]]

    def normalised(self, images: Any) -> Any:
        """Return uint8 images [N, C, H, W] as normalised floats."""
        mean, std = (np.array(self.policy[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
        return (images.astype(np.float32) / 255 - mean) / std

    def checked(self, images: Any) -> Any:
        """Return uint8 images, or normalised floats, as input of the network.

        Raises:
            ValueError: shape, dtype or values are wrong; the message is one line.
        """
        shape = self.policy["input_shape"]
        if list(images.shape[1:]) != shape or not len(images):
            expected = f"expected [N, {', '.join(map(str, shape))}], N at least 1"
            raise ValueError(f"has the shape {list(images.shape)}; {expected}")
        if images.dtype == np.uint8:
            return self.normalised(images)
        if images.dtype.kind != "f":
            raise ValueError(f"has the dtype {images.dtype}; expected uint8, or normalised floats")
        if not np.isfinite(images).all():
            raise ValueError("has values that are not finite")
        return images.astype(np.float32)

    def __call__(self, images: Any) -> tuple[Any, Any]:
        """Return each image's logits [N, C] at the exit where it leaves, and that exit [N], from 0."""
        limits = [float(limit) for limit in self.policy["thresholds"]]
        temperatures = self.policy["temperatures"] or [1.0] * len(limits)
        rows, state = np.arange(len(images)), [images]
        outputs, exits = [None] * len(images), np.zeros(len(images), np.int64)
        before, streak = np.full(len(images), -1), np.zeros(len(images))
        for index, program in enumerate(self.programs):
            if not len(rows):
                break
            logits, *state = program(state)
            predicted = logits.argmax(1)
            streak, before = np.where(predicted == before, streak, 0) + 1, predicted
            if self.policy["score"] == "patience":
                scores = streak
            else:
                scores = exit_scores(logits.astype(np.float64) / temperatures[index], self.policy["score"])
            remain = ~(scores >= limits[index])
            for row, output in zip(rows[~remain], logits[~remain], strict=True):
                outputs[row], exits[row] = output, index
            rows, before, streak = rows[remain], before[remain], streak[remain]
            state = [part[remain] for part in state]
        return np.array(outputs), exits


def read(path: str) -> Any:
    """Return the array of an .npy file.

    Raises:
        ValueError: the file can't be read, or is no array; the message is one line.
    """
    try:
        images = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror or error}") from None
    except Exception:  # numpy raises errors of many types for a damaged file
        images = None
    if not isinstance(images, np.ndarray):  # an .npz file contains several arrays
        raise ValueError("is not an array; expected a file written by numpy.save")
    return images


def open_runner(folder: Path) -> Runner:
    """Return the runner of the export in a folder.

    Raises:
        RuntimeError: files are missing or damaged, or a package is not installed; the message is one line.
    """
    try:
        return Runner(folder)
    except ImportError as error:
        raise RuntimeError(f"{error}; pip install {error.name}") from None
    except OSError as error:
        raise RuntimeError(f"{error.filename}: {error.strerror}; run.py works in its own folder only") from None
    except Exception as error:  # json, onnxruntime and torch raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"{folder} has no complete export ({reason}); export the run again") from None


def main(arguments: list[str], folder: Path) -> int:
    """Predict the images of a file by the export in a folder, print the predictions, and return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    if len(arguments) != 1:
        print("usage: python run.py IMAGES.npy (see --help)", file=sys.stderr)
        return 2
    try:
        images = read(arguments[0])
        runner = open_runner(folder)
        images = runner.checked(images)
    except ValueError as error:
        print(f"run.py: {arguments[0]} {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    logits, exits = runner(images)
    for number, (predicted, exit_index) in enumerate(zip(logits.argmax(1), exits, strict=True)):
        print(number, runner.policy["class_names"][predicted], f"exit {exit_index + 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).parent))
