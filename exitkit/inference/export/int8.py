"""Quantisation of an ONNX export to int8 by onnxruntime's static quantiser, with a rule of its own.

The ranges of the activations are calibrated on validation images, which pass through the fp32 stages, so that each
stage is calibrated on the inputs that it gets. Between two stages, states remain fp32. Who leaves where is chosen anew
on the quantised outputs. Weights have 7 bits, so that no processor saturates its sums and the outputs, and with them
the thresholds, are the same everywhere.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from exitkit.errors import UserError
from exitkit.files import disk_error, drafted, exists, write_json
from exitkit.inference.export import runner
from exitkit.inference.export.bundle import complete
from exitkit.inference.policy import ExitPolicy
from exitkit.inference.rule import PointRule

_BATCH = 64
_CANDIDATES = 256  # images that the examples are taken from
_ROUNDS = 5
_READ = 1024  # images in memory at a time, a multiple of the batch
_CALIBRATION = 1000  # images of validation, about, that the ranges of int8 are measured on
_FACTS = ("format", "programs", "all_exits", "input_shape")


def quantise(
    source: Path,
    out: Path,
    images: Mapping[str, Any],
    choose: Callable[[dict[str, np.ndarray]], tuple[PointRule | ExitPolicy, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Write an int8 copy of an ONNX export; the folder is complete or does not appear.

    Args:
        source: the folder of the fp32 export.
        out: the folder to write, which must not exist.
        images: normalised images, float32 [N, *input_shape], of the parts validation (for calibration) and test; read
            by slices, in batches.
        choose: logits of the quantised exits for each part [N, K, C] -> the exit rule or policy, and further entries of
            `policy.json`, as in `export`.

    Returns:
        the content of the new `policy.json`.

    Raises:
        UserError: the folder exists.
    """
    if exists(out):
        raise UserError(f"{out} exists already; give another folder by --out")
    facts = json.loads((source / "policy.json").read_text(encoding="utf-8"))
    try:
        with drafted(out) as draft:
            spread = slice(None, None, max(1, len(images["validation"]) // _CALIBRATION))
            state = [calibration := images["validation"][spread]]
            for name in facts["programs"]:
                _quantise(source / name, draft / name, state)
                _, *state = _in_batches(runner.load(source / name), state)
            _quantise(source / facts["all_exits"], draft / facts["all_exits"], [calibration])
            rule, about = choose({part: _logits(draft, facts["programs"], array) for part, array in images.items()})
            kept = {key: facts[key] for key in _FACTS}
            policy: dict[str, Any] = json.loads(rule.to_json()) | kept | {"precision": "int8"} | dict(about)
            write_json(draft / "policy.json", policy)
            policy = complete(draft, images["test"][:_CANDIDATES])
            draft.rename(out)
    except OSError as error:
        raise disk_error(out, error) from None
    return policy


def _quantise(source: Path, target: Path, inputs: Sequence[np.ndarray]) -> None:
    # Imported when used: an extra.
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [node.name for node in onnxruntime.InferenceSession(str(source)).get_inputs()]

    class Reader(CalibrationDataReader):
        """Hands the inputs to the quantiser, batch by batch."""

        def __init__(self) -> None:
            self.batches = iter(range(0, len(inputs[0]), _BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            """Return the next batch, or None after the last one."""
            start = next(self.batches, None)
            if start is None:
                return None
            return {name: part[start : start + _BATCH] for name, part in zip(names, inputs, strict=True)}

    with TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder, source.name)
        # The graph optimisation folds batch normalisation into convolutions, which are then quantised as one.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        # Weights of 7 bits: processors without int8 dot products add two products in 16 bits, which 8 bits overflow.
        quantize_static(str(prepared), str(target), Reader(), per_channel=True, reduce_range=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the advice that the quantiser logs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _in_batches(program: runner.Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    starts = range(0, len(inputs[0]), _BATCH)
    parts = [program([part[start : start + _BATCH] for part in inputs]) for start in starts]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _logits(folder: Path, programs: Sequence[str], images: Any) -> np.ndarray:
    """Return the logits of all exits [N, K, C], stage by stage, as the runner computes them."""
    loaded, rows = [runner.load(folder / name) for name in programs], []
    for first in range(0, len(images), _READ):
        read = images[first : first + _READ]
        for start in range(0, len(read), _BATCH):
            state, outputs = [read[start : start + _BATCH]], []
            for program in loaded:
                logits, *state = program(state)
                outputs.append(logits)
            rows.append(np.stack(outputs, 1))
    return np.concatenate(rows)


def compare(
    folders: Mapping[str, Path], images: np.ndarray, labels: np.ndarray, costs: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Compare exports of one network on test images; their times are measured alternately.

    Args:
        folders: {name: folder of an export}.
        images: normalised images, float32 [N, *input_shape].
        labels: their classes, [N].
        costs: multiply-adds up to each exit, [K].

    Returns:
        {name: `exits`, the accuracy of each exit in percent; with early exit `accuracy`, mean `cost` per image, and
        `milliseconds` per image in batches of at most 64 images}.
    """
    runners = {name: runner.Runner(folder) for name, folder in folders.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, run in runners.items():
        logits = _logits(folders[name], run.policy["programs"], images)
        parts = [run(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
        outputs, exits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        accuracies = 100 * (logits.argmax(2) == labels[:, None]).mean(0)
        found[name] = {
            "exits": accuracies.tolist(),
            "accuracy": float(100 * (outputs.argmax(1) == labels).mean()),
            "cost": float(np.asarray(costs, np.float64)[exits].mean()),
        }
    batch = images[:_BATCH]
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(_ROUNDS):
        for name, run in runners.items():
            began = time.perf_counter()
            run(batch)
            times[name].append(1000 * (time.perf_counter() - began) / len(batch))
    return {name: values | {"milliseconds": float(np.median(times[name]))} for name, values in found.items()}
