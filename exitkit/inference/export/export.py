"""Export for deployment: one program per stage with its head, the exit policy, and a runner without exitkit."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from exitkit.errors import UserError
from exitkit.files import disk_error, drafted, exists, make_folder, write_json
from exitkit.inference.export import runner
from exitkit.inference.export.programs import Piece, all_exits, pieces, without_taps
from exitkit.inference.rule import ExitRule
from exitkit.inference.scores import scores
from exitkit.inference.thresholds import leave_at
from exitkit.networks.cascade import MultiExitNetwork

Format = Literal["onnx", "torch-export"]
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-3
"""Largest deviation of an exported program, in units of the largest logit: other kernels sum in another order."""


def export(
    network: MultiExitNetwork, rule: ExitRule, out: Path, images: Tensor, about: Mapping[str, Any], form: Format
) -> dict[str, Any]:
    """Export a network, and check the exported programs on real images; the folder is complete or does not appear.

    Args:
        network: the network, adapted and trained, on the CPU.
        rule: the exit rule.
        out: the folder, which must not exist.
        images: at least two images, normalised [N, *input_shape].
        about: further entries of `policy.json`: `mean`, `std`, `class_names`, ...
        form: `onnx` or `torch-export`.

    Returns:
        the content of `policy.json`.

    Raises:
        UserError: the folder exists; onnx is not installed; torch can't export the network; or the outputs of the
            exported programs differ from the network's.
    """
    if form not in ENDINGS:
        raise UserError(f"format is {form!r}; expected {' or '.join(ENDINGS)}")
    if exists(out):
        raise UserError(f"{out} exists already; give another folder by --out")
    if len(rule.thresholds) != network.num_exits:
        raise UserError(f"the rule has {len(rule.thresholds)} thresholds; expected {network.num_exits}, one per exit")
    if form == "onnx":
        _check_installed()
    make_folder(out.parent)
    try:
        with drafted(out) as draft:
            policy = _write(without_taps(network), rule, draft, images, about, form)
            check(draft, network, rule, images)
            draft.rename(out)
    except OSError as error:
        raise disk_error(out, error) from None
    return policy


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'exitkit[onnx]'; or use torch-export")


def _write(
    network: MultiExitNetwork, rule: ExitRule, folder: Path, images: Tensor, about: Mapping[str, Any], form: Format
) -> dict[str, Any]:
    ending = ENDINGS[form]
    programs = []
    for number, piece in enumerate(pieces(network, images[:2]), start=1):
        programs.append(f"stage-{number}{ending}")
        _export(piece, folder / programs[-1], form)
    _export(all_exits(network, images[:2]), folder / f"all-exits{ending}", form)
    shutil.copyfile(str(runner.__file__), folder / "run.py")
    facts = {"format": form, "programs": programs, "all_exits": f"all-exits{ending}"}
    policy: dict[str, Any] = (
        json.loads(rule.to_json()) | facts | {"input_shape": list(network.input_shape)} | dict(about)
    )
    write_json(folder / "policy.json", policy)
    return policy


@torch.no_grad()
def _export(piece: Piece, path: Path, form: Format) -> None:
    batch = torch.export.Dim("batch", min=1)
    sizes: Any = {0: batch}
    shapes = ((sizes,) * len(piece.inputs),)
    # Warnings of torch's exporter do not concern the user of exitkit.
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            program = torch.export.export(piece.module, piece.inputs, dynamic_shapes=shapes)
            if form == "torch-export":
                torch.export.save(program, path)
                return
            inputs, outputs = piece.names
            torch.onnx.export(
                program,
                f=path,
                input_names=inputs,
                output_names=outputs,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the tracer and the converter raise errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"torch can't export {path.stem} as {form}: {type(error).__name__}: {reason}") from error
    finally:
        logger.setLevel(before)


@torch.inference_mode()
def check(folder: Path, network: MultiExitNetwork, rule: ExitRule, images: Tensor) -> None:
    """Compare the exported programs with the network on real images: the logits of all exits, and the exits used.

    An image may leave at another exit only if one of its scores is within `TOLERANCE` of the threshold.

    Raises:
        UserError: they differ.
    """
    expected = torch.stack(network.eval()(images).logits, 1).numpy()
    policy = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    all_logits = np.stack(runner.load(folder / policy["all_exits"])([images.numpy()]), 1)
    _compare("all exits at once", all_logits, expected)
    logits, exits = runner.Runner(folder)(images.numpy())
    _compare("exit by exit", logits, expected[np.arange(len(exits)), exits])
    values = scores(expected, rule.score, rule.temperatures)
    differs = exits != leave_at(values, [rule.thresholds])[0]
    if rule.score != "patience":
        differs &= ~(np.abs(values - rule.thresholds) <= TOLERANCE).any(1)
    if differs.any():
        raise UserError(
            f"in the exported network {differs.sum()} of {len(images)} images leave at another exit; "
            "nothing was exported"
        )


def _compare(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    error = float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))
    if not error <= TOLERANCE:
        raise UserError(
            f"the logits of the exported network ({what}) differ by {error:.2g} of the largest logit; "
            "nothing was exported"
        )
