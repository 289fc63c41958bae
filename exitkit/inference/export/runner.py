"""Runs an exported network with early exit: a stage is computed only for the images that have not left before it.

Needs numpy, and onnxruntime or (for torch-export) torch; Pillow for image files; starlette and uvicorn for --serve.
exitkit itself is not needed. Part of exitkit, MIT licence.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

Program = Callable[[list[Any]], list[Any]]


class OptionError(ValueError):
    """An option that does not fit the machine or the export."""


POLICY_KEYS = ("score", "thresholds", "temperatures", "rule", "combination")
"""The keys of policy.json that an operating point replaces."""
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".dib", ".tif", ".tiff",
    ".webp", ".gif", ".avif", ".jp2", ".j2k", ".tga",
)  # fmt: skip
_BATCH = 64


def load(path: Path, threads: int | None = None, providers: Sequence[str] | None = None) -> Program:
    """Return one exported program: a list of arrays -> a list of arrays.

    Args:
        path: the file.
        threads: CPU threads; None: the library's choice.
        providers: execution providers of onnxruntime, in the order of preference; None: all that are installed.

    Raises:
        OptionError: a provider is not installed, or providers are given for a program of torch.export.
    """
    # Imported when used: a folder needs onnxruntime or torch, not both.
    if path.suffix == ".onnx":
        import onnxruntime

        installed = onnxruntime.get_available_providers()
        if missing := [name for name in providers or () if name not in installed]:
            raise OptionError(f"the provider {missing[0]} is not installed; expected some of {', '.join(installed)}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings are about the graph, which a user can't change
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers or installed))
        names = [node.name for node in session.get_inputs()]
        return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))
    if providers:
        raise OptionError("providers are those of onnxruntime; expected none for programs of torch.export")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    module = torch.export.load(path).module()
    return lambda arrays: [output.detach().numpy() for output in module(*map(torch.from_numpy, arrays))]


def exit_scores(logits: Any, score: str, temperature: float = 1.0) -> Any:
    """Return the score of each sample at an exit, [N], from its logits [N, C]; patience is not among these scores."""
    z = logits.astype(np.float64)
    z = (z - z.max(1, keepdims=True)) / temperature
    weights, classes = np.exp(z), z.shape[1]
    total = weights.sum(1)
    if score == "confidence":
        return 1 / total
    if classes == 1:
        return np.ones(len(z))
    if score == "margin":
        return -np.expm1(np.partition(z, -2, 1)[:, -2]) * (1 / total)
    return np.maximum(1 - _entropy(z, weights, total) / np.log(classes), 0)


def _entropy(z: Any, weights: Any, total: Any) -> Any:
    return np.log(total) - (weights * np.where(weights > 0, z, 0)).sum(1) / total


# Combinations: (table `combination` of policy.json, exit k, logits [N, C], carry) -> log-probabilities [N, C] and the
# carry for the next exit, a tuple of arrays [N, C].


def _log_softmax(z: Any) -> Any:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def _calibrated(table: Any, k: int, z: Any, carry: Any) -> Any:
    return _log_softmax(z / table["temperatures"][k]), ()


def _product(table: Any, k: int, z: Any, carry: Any) -> Any:
    total, previous = (k + 1) / table["exits"] * np.log(np.where(z <= 0, 0, z)), _log_softmax(z)
    if carry is not None:
        total, previous = carry[0] + total, carry[1]
    output = np.where(total.max(1, keepdims=True) == -np.inf, previous, _log_softmax(total))
    return output, (total, output)


def _caching(table: Any, k: int, z: Any, carry: Any) -> Any:
    output = _log_softmax(z)
    if carry is not None:
        keeps = carry[0].max(1, keepdims=True) >= output.max(1, keepdims=True)
        output = np.where(keeps, carry[0], output)
    return output, (output,)


def _add_logs(a: Any, b: Any) -> Any:
    top = np.maximum(a, b)
    base = np.where(top == -np.inf, 0, top)
    return base + np.log(np.exp(a - base) + np.exp(b - base))


def _averaged(table: Any, k: int, z: Any, carry: Any) -> Any:
    mie = table["name"] == "mie"
    weights = table["weights"][0] if mie else [1.0] * table["exits"]
    total = _log_softmax(z / (table["temperatures"][k] if mie else 1.0)) + math.log(weights[k])
    if carry is not None:
        total = _add_logs(carry[0], total)
    return total - math.log(sum(weights[: k + 1])), (total,)


def _geometric(table: Any, k: int, z: Any, carry: Any) -> Any:
    parts = (*(carry or ()), _log_softmax(z))
    total, excluded = np.zeros_like(z), np.zeros(z.shape, bool)
    for weight, part in zip(table["weights"][k], parts, strict=True):
        excluded |= part == -np.inf
        total = total + weight / (k + 1) * np.where(part == -np.inf, 0, part)
    if table["biases"]:
        total = total + np.array(table["biases"][k])
    return _log_softmax(np.where(excluded, -np.inf, total)), parts


def _additive(table: Any, k: int, z: Any, carry: Any) -> Any:
    parts = (*(carry or ()), np.exp(_log_softmax(z)))
    total = np.array(table["biases"][k]) + np.zeros_like(z)
    for weight, part in zip(table["weights"][k], parts, strict=True):
        total = total + weight * part
    return np.log(total / total.sum(1, keepdims=True)), parts


COMBINATIONS: dict[str, Callable[..., Any]] = {
    "calibrated": _calibrated,
    "product": _product,
    "caching": _caching,
    "geometric": _geometric,
    "additive": _additive,
    "mean": _averaged,
    "mie": _averaged,
}


# Rules: (table of the rule, exit k, outputs [N, C], memory) -> whether each sample leaves [N], and the memory for the
# next exit, a tuple of arrays [N, ...].


def _thresholds(table: Any, k: int, outputs: Any, memory: Any) -> Any:
    if table["score"] != "patience":
        temperature = 1.0 if table["temperatures"] is None else table["temperatures"][k]
        return exit_scores(outputs, table["score"], temperature) >= float(table["thresholds"][k]), None
    predicted, streak = outputs.argmax(1), np.ones(len(outputs))
    if memory is not None:
        streak += np.where(predicted == memory[0], memory[1], 0)
    return streak >= float(table["thresholds"][k]), (predicted, streak)


def _agreement(table: Any, k: int, outputs: Any, memory: Any) -> Any:
    predicted, total = outputs.argmax(1), table["weights"][k] * exit_scores(outputs, "confidence")
    if memory is not None:
        total += np.where(predicted == memory[0], memory[1], 0)
    return total >= table["limits"][0, k], (predicted, total)


def _stopping(table: Any, k: int, outputs: Any, memory: Any) -> Any:
    score = exit_scores(outputs, table["score"])
    right = np.interp(score, table["knots"][k], table["values"][k])
    g = np.clip(np.log(score) - np.log1p(-score), -12, 12)
    before, total = memory or (np.zeros_like(g), np.zeros_like(g))
    total = total + g
    expected, *slopes = table["coefficients"][0, k]
    for slope, column in zip(slopes, (g, g**2, before, total / (k + 1)), strict=True):
        expected = expected + column * slope
    return right - table["prices"][0] * table["costs"][k] >= expected, (g, total)


def _jei(table: Any, k: int, outputs: Any, memory: Any) -> Any:
    z = outputs.astype(np.float64)
    z = z - z.max(1, keepdims=True)
    measures = [exit_scores(z, "confidence"), exit_scores(z, "margin")]
    entropies = [_entropy(part, np.exp(part), np.exp(part).sum(1)) for part in (z, 2 * z)]
    *weights, activation = table["gates"][0, k]
    for weight, measure in zip(weights, (measures[0], entropies[0], measures[1], entropies[1]), strict=True):
        activation = activation + measure * weight
    gate = 1 / (1 + np.exp(-activation))
    total = np.zeros_like(gate) if memory is None else memory[0]
    return (1 - total <= gate) | (gate >= 0.5 * (1 - total)), (total + gate,)


def _eenet(table: Any, k: int, outputs: Any, memory: Any) -> Any:
    z = outputs.astype(np.float64)
    weights = np.exp(z - z.max(1, keepdims=True))
    probability = weights / weights.sum(1, keepdims=True)
    own, earlier = table["weights"][0, k], () if memory is None else memory
    q = (probability * table["class_weights"][0, k]).sum(1)
    q += exit_scores(z, "confidence") * own[0] + exit_scores(z, "entropy") * own[1]
    for weight, before in zip(own[2:], earlier, strict=False):
        q += before * weight
    q = np.clip(q, 0, 1)
    return q >= table["limits"][0, k], (*earlier, q)


RULES: dict[str, Callable[..., Any]] = {
    "agreement": _agreement,
    "stopping": _stopping,
    "jei": _jei,
    "eenet": _eenet,
}


def decide(policy: Any, index: int, logits: Any, memory: Any) -> tuple[Any, Any, Any]:
    """Return the outputs of an exit [N, C], which samples leave there [N], and the memory for the next exit.

    Args:
        policy: the content of policy.json, with its arrays `decoded`.
        index: the exit, from 0.
        logits: [N, C], of the samples that have not left.
        memory: the memory returned for the exit before, without the rows of samples that left; None at the first.

    Raises:
        RuntimeError: the logits are not finite.
    """
    if not np.isfinite(logits.max(1)).all():
        raise RuntimeError(f"the outputs of exit {index + 1} are not finite")
    carry, before = memory or (None, None)
    combination, rule = policy.get("combination"), policy.get("rule")
    outputs = logits
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        if combination is not None:
            z = logits.astype(np.float64)
            outputs, carry = COMBINATIONS[combination["name"]](combination, index, z, carry)
        if index == len(policy["programs"]) - 1:
            return outputs, np.ones(len(logits), bool), None
        decided = _thresholds if rule is None else RULES[rule["name"]]
        leaves, after = decided(policy if rule is None else rule, index, outputs, before)
    return outputs, leaves, (carry, after)


def decoded(value: Any) -> Any:
    """Return a value of policy.json with its arrays, which are tables of a shape and values, as numpy arrays."""
    if isinstance(value, list):
        return [decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"shape", "values"}:
        return np.array([float(number) for number in value["values"]]).reshape(value["shape"])
    return {key: decoded(part) for key, part in value.items()}


def _kept(memory: Any, rows: Any) -> Any:
    """Return a memory without the rows of samples that left."""
    if isinstance(memory, tuple):
        return tuple(_kept(part, rows) for part in memory)
    return None if memory is None else memory[rows]


def _inside(folder: Path, name: Any) -> Path:
    """Return the path of a program, which must be a file of the folder itself: a policy may be a stranger's.

    Raises:
        ValueError: it is elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise ValueError(f"programs of policy.json has {name!r}; expected the name of a file in this folder")
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"programs of policy.json has {name!r}, which is a link out of this folder")
    return path


# Preprocessing: an image file -> uint8 [C, H, W], as in evaluation by exitkit.


def read_picture(source: Any, most_pixels: float = math.inf) -> Any:
    """Read an image file as people see it: EXIF orientation applied, transparent pixels white, the first of several.

    Args:
        source: a path, or a file object.
        most_pixels: largest number of pixels.

    Returns:
        a PIL image, RGB.

    Raises:
        ValueError: it is not an image that Pillow can read, is too large, or has more than 8 bits per channel.
        RuntimeError: Pillow is not installed.
    """
    try:
        # Imported when used: arrays do not need Pillow.
        from PIL import Image, ImageOps
    except ImportError:
        raise RuntimeError("image files need Pillow; pip install pillow") from None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(source) as file:
            if file.width * file.height > most_pixels:
                raise ValueError(f"has {file.width} x {file.height} pixels; expected at most {most_pixels:.0f}")
            file.load()
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"has more than 8 bits per channel (mode {file.mode}); expected 8")
            with contextlib.suppress(Exception):  # damaged EXIF data: viewers ignore it
                ImageOps.exif_transpose(file, in_place=True)
            if file.mode not in ("RGBA", "RGBa", "LA", "La", "PA") and "transparency" not in file.info:
                return file.convert("RGB")
            image = file.convert("RGBA")
            opaque = Image.new("RGB", image.size, "white")
            opaque.paste(image, mask=image.getchannel("A"))
            return opaque
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many types of error for invalid files
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        named = "it is not an image" if type(error).__name__ == "UnidentifiedImageError" else reason
        raise ValueError(f"can't be read: {named}") from None


def preprocessed(image: Any, how: Any, most_pixels: float = math.inf) -> Any:
    """Return a PIL image (RGB) resized and cropped, as uint8 [C, H, W].

    Args:
        image: the image.
        how: `preprocessing` of policy.json: the shorter side becomes `resize` pixels long by `interpolation`, and the
            centre of `crop` (height, width) pixels is kept; with `resize` 0, the image just covers `crop`. `colour` is
            RGB or L (grey).
        most_pixels: largest number of pixels after resizing.

    Raises:
        ValueError: it would have more pixels.
    """
    # Imported when used: arrays do not need Pillow.
    from PIL import Image

    width, height = image.size
    rows, columns = how["crop"]
    short = how["resize"]
    if short:
        wide = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    else:
        scale = max(columns / width, rows / height)
        wide = (max(round(scale * width), columns), max(round(scale * height), rows))
    if wide[0] * wide[1] > most_pixels:
        resized = f"{wide[0]} x {wide[1]} pixels when resized (from {width} x {height})"
        raise ValueError(f"has {resized}; expected at most {most_pixels:.0f}")
    if wide != image.size:
        image = image.resize(wide, Image.Resampling[how["interpolation"].upper()])
        width, height = image.size
    left, top = round((width - columns) / 2), round((height - rows) / 2)
    pixels = np.asarray(image.crop((left, top, left + columns, top + rows)).convert(how["colour"]))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def check_preprocessing(how: Any, shape: Sequence[int]) -> None:
    """Check `preprocessing` of policy.json against the shape [C, H, W] of the input.

    Raises:
        ValueError: they do not fit together.
    """
    if how is None:
        return
    fits = (
        isinstance(how, dict)
        and how.get("colour") == {1: "L", 3: "RGB"}.get(shape[0])
        and how.get("crop") == list(shape[1:])
        and how.get("interpolation") in ("nearest", "bilinear", "bicubic")
        and type(how.get("resize")) is int
        and 0 <= how["resize"] <= 100 * max(shape[1:])
    )
    if not fits:
        raise ValueError(f"preprocessing is {how!r:.80}, which does not fit the input {list(shape)}")


class Runner:
    """An exported network and its exit policy, read from a folder.

    Args:
        folder: the folder that `exitkit export` wrote.
        threads, providers: see `load`.
        point: name of an operating point; None: the chosen one.

    Attributes:
        policy: the content of policy.json, at the operating point.
        points: {name: policy} of all operating points, from the lowest cost to the highest.
        programs: one per stage: arrays of the stage's input -> the exit's logits and the next stage's input.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        point: str | None = None,
    ) -> None:
        policy = decoded(json.loads((folder / "policy.json").read_text(encoding="utf-8")))
        self.points = {row["name"]: at_point(policy, row) for row in policy.get("points", [])}
        if point is not None and point not in self.points:
            raise OptionError(f"the operating point {point} is unknown; expected one of {', '.join(self.points)}")
        self.policy = policy if point is None else self.points[point]
        self.programs = [load(_inside(folder, name), threads, providers) for name in policy["programs"]]

    def normalised(self, images: Any) -> Any:
        """Return uint8 images [N, C, H, W] as normalised floats."""
        mean, std = (np.array(self.policy[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
        return (images.astype(np.float32) / 255 - mean) / std

    def checked(self, images: Any) -> Any:
        """Return uint8 images, or normalised floats, as input of the network.

        Raises:
            ValueError: shape, dtype or values are wrong; the message is one line.
        """
        self.check_kind(images)
        if images.dtype == np.uint8:
            return self.normalised(images)
        with np.errstate(over="ignore"):
            images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise ValueError("has values that are not finite")
        return images

    def check_kind(self, images: Any) -> None:
        """Check shape and dtype of an array of images.

        Raises:
            ValueError: one of them is wrong; the message is one line.
        """
        shape = self.policy["input_shape"]
        if list(images.shape[1:]) != shape or not images.size:
            expected = f"expected [N, {', '.join(map(str, shape))}], N at least 1"
            raise ValueError(f"has the shape {list(images.shape)}; {expected}")
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise ValueError(f"has the dtype {images.dtype}; expected uint8, or normalised floats")

    def picture(self, source: Any, most_pixels: float = math.inf) -> Any:
        """Return an image file (a path, or a file object) as input of the network, [1, C, H, W].

        Raises:
            ValueError: the file can't be read, or the network was not trained on images that can be files.
            RuntimeError: Pillow is not installed.
        """
        how = self.policy.get("preprocessing")
        if how is None:
            raise ValueError("is an image file; expected an array: the data set of this network transforms its images")
        return self.normalised(preprocessed(read_picture(source, most_pixels), how, most_pixels)[None])

    def decide(self, index: int, logits: Any, memory: Any, point: str) -> tuple[Any, Any, Any]:
        """Decide at exit `index` by the policy of an operating point; see the function `decide`."""
        return decide(self.points.get(point, self.policy), index, logits, memory)

    def __call__(self, images: Any) -> tuple[Any, Any]:
        """Return each image's outputs [N, C] at the exit where it leaves, and that exit [N], from 0.

        The outputs are logits, or the log-probabilities of the policy's combination.

        Raises:
            RuntimeError: the outputs of an exit are not finite.
        """
        rows, state, memory = np.arange(len(images)), [images], None
        outputs, exits = [None] * len(images), np.zeros(len(images), np.int64)
        for index, program in enumerate(self.programs):
            if not len(rows):
                break
            logits, *state = program(state)
            combined, leaves, memory = decide(self.policy, index, logits, memory)
            for row, output in zip(rows[leaves], combined[leaves], strict=True):
                outputs[row], exits[row] = output, index
            rows, memory = rows[~leaves], _kept(memory, ~leaves)
            state = [part[~leaves] for part in state]
        return np.array(outputs), exits

    def rehearse(self) -> None:
        """Run blank images through all stages, and decide at every exit by the policy of every operating point.

        Raises:
            ValueError: programs, policy and class names do not fit together.
        """
        shape, names = self.policy["input_shape"], self.policy["class_names"]
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)):
            raise ValueError(f"input_shape is {shape!r:.60}; expected three positive integers")
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is not a list of names")
        if not len(self.policy["mean"]) == len(self.policy["std"]) == shape[0]:
            raise ValueError(f"mean and std are not lists of {shape[0]} numbers, one per channel")
        check_preprocessing(self.policy.get("preprocessing"), shape)
        state, memories = [self.checked(np.zeros((2, *shape), np.uint8))], dict.fromkeys(["", *self.points])
        for index, program in enumerate(self.programs):
            logits, *state = program(state)
            if logits.shape != (2, len(names)):
                raise ValueError(f"exit {index + 1} has outputs {logits.shape[1:]}; expected ({len(names)},)")
            for name, memory in memories.items():
                policy = self.points[name] if name else self.policy
                memories[name] = decide(policy, index, logits, memory)[2]


def at_point(policy: dict[str, Any], point: dict[str, Any]) -> Any:
    """Return the content of policy.json at one of its `points`."""
    return {key: value for key, value in policy.items() if key not in POLICY_KEYS} | point["policy"]


def read(path: str) -> Any:
    """Return the array of an .npy file, of which only the parts that are used are read.

    Raises:
        ValueError: the file can't be read, or is no array; the message is one line.
    """
    try:
        images = np.load(path, allow_pickle=False, mmap_mode="r")
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror or error}") from None
    except Exception:  # numpy raises errors of many types for a damaged file
        images = None
    if not isinstance(images, np.ndarray):  # an .npz file contains several arrays
        raise ValueError("is not an array; expected a file written by numpy.save, or an image file")
    return images


def inputs(runner: Runner, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, input [1, C, H, W]) of the images of an .npy file, an image file or a folder of image files.

    Raises:
        ValueError: an image can't be read or is of a wrong shape; the message is one line.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
        if not files:
            raise ValueError(f"{name} has no image files; expected names that end in {', '.join(IMAGE_ENDINGS)}")
    elif path.suffix.lower() in (".npy", ".npz", "") or _begins_as_array(path):
        with _named(name):
            images = read(name)
            runner.check_kind(images)
        for number in range(len(images)):
            with _named(name):
                yield str(number), runner.checked(np.asarray(images[number : number + 1]))
        return
    else:
        files = [path]
    for file in files:
        with _named(str(file)):
            yield str(file), runner.picture(file)


def _begins_as_array(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(6) == b"\x93NUMPY"
    except OSError:  # reported when the file is read
        return False


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of a file before the messages of ValueErrors about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def predict(runner: Runner, names: Sequence[str]) -> None:
    """Print the name or number, the predicted class and the exit of each image of files and folders."""

    def flush() -> None:
        logits, exits = runner(np.concatenate([image for _, image in waiting]))
        for (name, _), row, exit_index in zip(waiting, logits.argmax(1), exits, strict=True):
            print(_printable(name), _printable(runner.policy["class_names"][row]), f"exit {exit_index + 1}")
        waiting.clear()

    waiting: list[tuple[str, Any]] = []
    for each in names:
        for named in inputs(runner, each):
            waiting.append(named)
            if len(waiting) == _BATCH:
                flush()
    if waiting:
        flush()


def open_runner(
    folder: Path,
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    point: str | None = None,
) -> Runner:
    """Return the runner of the export in a folder; see `Runner`.

    Raises:
        RuntimeError: files are missing or damaged or do not fit together, or a package is not installed; the message
            is one line.
    """
    try:
        runner = Runner(folder, threads=threads, providers=providers, point=point)
        runner.rehearse()
    except OptionError as error:
        raise RuntimeError(str(error)) from None
    except ImportError as error:
        raise RuntimeError(f"{error}; pip install {error.name}") from None
    except OSError as error:
        raise RuntimeError(f"{error.filename}: {error.strerror}; run.py works in its own folder only") from None
    except Exception as error:  # json, numpy, onnxruntime and torch raise errors of many types
        reason = (str(error).splitlines() or [""])[0]
        named = reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
        raise RuntimeError(f"{folder} has no complete export ({named}); export the run again") from None
    return runner


def check(folder: Path, **options: Any) -> str:
    """Compare the files of an export with manifest.json, and the predictions for its example images with policy.json.

    Digests show damage, and not who made the files.

    Returns:
        what was checked, as text.

    Raises:
        RuntimeError: something differs; the message is one line.
    """
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, digest in files.items():
            if hashlib.sha256(_inside(folder, name).read_bytes()).hexdigest() != digest:
                raise RuntimeError(f"{name} is not the file that was exported (its SHA-256 differs); copy it again")
    except OSError as error:
        raise RuntimeError(f"{error.filename}: {error.strerror}; copy the whole folder again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RuntimeError("manifest.json is damaged; copy it again") from None
    runner = open_runner(folder, **options)
    expected = runner.policy.get("examples")
    named = {"policy.json", "run.py", *runner.policy["programs"], *(["examples.npy"] if expected else [])}
    if unlisted := sorted(named - files.keys()):
        raise RuntimeError(f"manifest.json has no digest of {unlisted[0]}; copy the whole folder again")
    if not expected:
        return f"{len(files)} files are as exported; the export has no example images"
    try:
        images = runner.checked(read(str(folder / "examples.npy")))
        if runner.policy.get("preprocessing") and (folder / "example.png").exists():
            with contextlib.suppress(RuntimeError):  # without Pillow no image file can be read
                _check_picture(runner, folder / "example.png", images[0])
        wanted = list(zip(expected["classes"], expected["exits"], strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"the examples are damaged ({error}); export the run again") from None
    one_by_one = [runner(image[None]) for image in images]
    for outputs, exits in (runner(images), map(np.concatenate, zip(*one_by_one, strict=True))):
        found = list(zip(outputs.argmax(1).tolist(), (exits + 1).tolist(), strict=True))
        for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            if ours != theirs:
                raise RuntimeError(
                    f"example {number} is class {ours[0]} at exit {ours[1]}; expected class {theirs[0]} at exit "
                    f"{theirs[1]}: this machine computes something else than the one that exported"
                )
    return f"{len(files)} files and {len(wanted)} example images are as exported"


def _check_picture(runner: Runner, path: Path, expected: Any) -> None:
    """Check that example.png is read as the first example; files of data sets of one size have that size.

    Raises:
        ValueError: it is not.
        RuntimeError: Pillow is not installed.
    """
    how = runner.policy["preprocessing"]
    rows, columns = how["crop"]
    if how["resize"] in (0, min(rows, columns)) and np.abs(runner.picture(path)[0] - expected).max() > 1e-6:
        raise ValueError("example.png is read as another image than the first of examples.npy")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"run.py: {message} (see --help)\n")


def _whole(low: int, high: int = 2**31) -> Callable[[str], int]:
    def read_number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {low} to {high}")
        return int(text)

    return read_number


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = _Parser(
        prog="python run.py",
        description=__doc__.partition("\n\n")[0],
        epilog="""Prints the name or number, the predicted class and the exit of each image. IMAGES are image files,
        folders of them, or arrays [N, C, H, W] written by numpy.save, of the input_shape in policy.json: either uint8
        (0 to 255), or floats that are already normalised: each channel divided by 255, minus its mean, divided by its
        std (both in policy.json).""",
        allow_abbrev=False,
    )
    made.add_argument("images", metavar="IMAGES", nargs="*", help="image file, folder or .npy file")
    made.add_argument("--check", action="store_true", help="check digests and example images")
    made.add_argument("--point", metavar="NAME", help="operating point, by its name in policy.json")
    made.add_argument("--threads", metavar="N", type=_whole(1, 1024), help="CPU threads")
    made.add_argument("--providers", metavar="NAMES", help="providers of onnxruntime, separated by commas")
    serving = made.add_argument_group("service", "needs starlette and uvicorn")
    serving.add_argument("--serve", metavar="PORT", type=_whole(0, 65535), help="serve requests (0: any free port)")
    serving.add_argument("--host", metavar="NAME", help="address to serve on (default: 127.0.0.1, this machine only)")
    serving.add_argument("--p99", metavar="MS", type=_whole(1), help="move along the operating points to keep this p99")
    serving.add_argument("--batch", metavar="N", type=_whole(1, 4096), help="largest batch (default: 32)")
    serving.add_argument("--queue", metavar="N", type=_whole(1, 10**6), help="most images that wait (default: 1024)")
    serving.add_argument("--max-mb", metavar="N", type=_whole(1, 1000), help="largest body in megabytes (default: 10)")
    serving.add_argument("--timeout", metavar="S", type=_whole(1, 600), help="seconds for a body (default: 10)")
    return made


SERVING = ("host", "p99", "batch", "queue", "max_mb", "timeout")
"""Options that are those of --serve."""


def serve(runner: Runner, given: argparse.Namespace) -> None:
    """Serve requests with the options of the command line.

    Raises:
        RuntimeError: a package is not installed, or the address can't be used; the message is one line.
    """
    try:
        # Imported when used: an extra. serve.py is in the folder of run.py.
        service = importlib.import_module("serve")
        importlib.import_module("uvicorn")
    except ImportError as error:
        missing = "serve.py is missing; copy the whole folder again" if error.name == "serve" else None
        raise RuntimeError(missing or f"--serve needs {error.name}; pip install starlette uvicorn") from None
    options = {"point": given.point, "size": given.batch, "queue": given.queue, "seconds": given.timeout}
    options |= {"p99": given.p99 and given.p99 / 1000, "max_bytes": given.max_mb and given.max_mb * 10**6}
    chosen = {name: value for name, value in options.items() if value is not None}
    service.serve(runner, given.host or "127.0.0.1", given.serve, **chosen)


def main(arguments: list[str], folder: Path) -> int:
    """Run the command line on the export in a folder, and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may have letters that the terminal does not know
    try:
        given = parser().parse_args(arguments)
        if (given.images != []) + given.check + (given.serve is not None) != 1:
            parser().error("expected IMAGES, --check or --serve")
        if given.check and given.point:
            parser().error("--check checks the chosen operating point; expected no --point")
        if given.serve is None and (lone := [f"--{name}" for name in SERVING if getattr(given, name) is not None]):
            parser().error(f"{lone[0].replace('_', '-')} is an option of --serve")
    except SystemExit as end:
        return int(end.code or 0)
    options = {
        "threads": given.threads,
        "providers": given.providers.split(",") if given.providers else None,
        "point": given.point,
    }
    try:
        if given.check:
            print(check(folder, **options))
        elif given.serve is not None:
            serve(open_runner(folder, **(options | {"point": None})), given)
        else:
            predict(open_runner(folder, **options), given.images)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has all that it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes again at its end
        return 1
    except KeyboardInterrupt:
        print("run.py: stopped", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"run.py: {_printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def _printable(text: str) -> str:
    """Return text with escapes for control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).parent))
