"""Runs an exported network so that nothing is computed for what is answered already.

usage: python run.py IMAGES.npy

Prints each image's number, class, and the exit where it left.

IMAGES.npy: an array [N, C, H, W] as numpy.save writes it; C, H and W are `input_shape` in policy.json. Either uint8,
the images as they are (0 to 255), which are normalised here; or floats that are normalised already: each channel
divided by 255, less its `mean`, divided by its `std` (both in policy.json).

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
        names = [given.name for given in session.get_inputs()]
        return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))
    import torch

    module = torch.export.load(path).module()
    return lambda arrays: [found.detach().numpy() for found in module(*map(torch.from_numpy, arrays))]


def sureness(logits: Any, score: str) -> Any:
    """Return how sure an exit is of each sample [N], from logits [N, C]: the larger, the surer."""
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
        """Return bytes [N, C, H, W] as the floats that the network was trained on."""
        mean, std = (np.array(self.policy[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
        return (images.astype(np.float32) / 255 - mean) / std

    def checked(self, images: Any) -> Any:
        """Return bytes, or floats that are normalised already, as what the network reads.

        Raises:
            ValueError: they are no such images; the message is one line.
        """
        shape = self.policy["input_shape"]
        if list(images.shape[1:]) != shape or not len(images):
            expected = f"expected [N, {', '.join(map(str, shape))}], N at least 1"
            raise ValueError(f"has the shape {list(images.shape)}; {expected}")
        if images.dtype == np.uint8:
            return self.normalised(images)
        if images.dtype.kind != "f":
            raise ValueError(f"holds {images.dtype}; expected uint8, or floats that are normalised already")
        if not np.isfinite(images).all():
            raise ValueError("holds numbers that are not finite")
        return images.astype(np.float32)

    def __call__(self, images: Any) -> tuple[Any, Any]:
        """Return each image's logits [N, C] at the exit where it left, and that exit [N], from 0."""
        limits = [float(limit) for limit in self.policy["thresholds"]]
        heat = self.policy["temperatures"] or [1.0] * len(limits)
        rows, state = np.arange(len(images)), [images]
        answers, exits = [None] * len(images), np.zeros(len(images), np.int64)
        before, streak = np.full(len(images), -1), np.zeros(len(images))
        for index, program in enumerate(self.programs):
            if not len(rows):
                break
            logits, *state = program(state)
            predicted = logits.argmax(1)
            streak, before = np.where(predicted == before, streak, 0) + 1, predicted
            patient = self.policy["score"] == "patience"
            sure = streak if patient else sureness(logits.astype(np.float64) / heat[index], self.policy["score"])
            stay = ~(sure >= limits[index])
            for row, answer in zip(rows[~stay], logits[~stay], strict=True):
                answers[row], exits[row] = answer, index
            rows, before, streak, state = rows[stay], before[stay], streak[stay], [part[stay] for part in state]
        return np.array(answers), exits


def read(path: str) -> Any:
    """Return the array of an .npy file.

    Raises:
        ValueError: it can't be read, or is none; the message is one line.
    """
    try:
        images = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror or error}") from None
    except Exception:  # numpy raises many kinds for a file that is none of its own, or a damaged one
        images = None
    if not isinstance(images, np.ndarray):  # an .npz file, which holds several, is none either
        raise ValueError("is no array; expected a file that numpy.save wrote")
    return images


def opened(folder: Path) -> Runner:
    """Return what runs the programs in a folder.

    Raises:
        RuntimeError: they are missing or damaged, or what runs them is not installed; the message is one line.
    """
    try:
        return Runner(folder)
    except ImportError as error:
        raise RuntimeError(f"{error}; pip install {error.name}") from None
    except OSError as error:
        raise RuntimeError(f"{error.filename}: {error.strerror}; run.py works in its own folder only") from None
    except Exception as error:  # json, onnxruntime and torch raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"{folder} holds no whole export ({reason}); export the run again") from None


def main(arguments: list[str], folder: Path) -> int:
    """Answer the images of a file with what lies in a folder; return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0
    if len(arguments) != 1:
        print("usage: python run.py IMAGES.npy (--help says what it holds)", file=sys.stderr)
        return 2
    try:
        images = read(arguments[0])
        runner = opened(folder)
        images = runner.checked(images)
    except ValueError as error:
        print(f"run.py: {arguments[0]} {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    logits, exits = runner(images)
    for number, (answer, left) in enumerate(zip(logits.argmax(1), exits, strict=True)):
        print(number, runner.policy["class_names"][answer], f"exit {left + 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).parent))
