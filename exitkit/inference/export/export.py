"""Export for deployment: one program per stage with its head, the exit policy, and a runner without exitkit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exitkit.errors import UserError
from exitkit.files import disk_error, drafted, exists, make_folder, write_json
from exitkit.inference.export import runner
from exitkit.inference.export.bundle import complete, logits_by_stage
from exitkit.inference.export.programs import (
    ENDINGS,
    Format,
    all_exits,
    missing_packages,
    pieces,
    without_taps,
    write_program,
)
from exitkit.inference.policy import ExitPolicy
from exitkit.inference.rule import PointRule
from exitkit.networks.cascade import MultiExitNetwork

TOLERANCE = 1e-3
"""Largest deviation of an exported program, in units of the largest logit: other kernels sum in another order."""
_CHANGES = 50
"""Random changes of the logits that show whether an image is close to another exit."""


def export(
    network: MultiExitNetwork,
    rule: PointRule | ExitPolicy,
    out: Path,
    images: Tensor,
    about: Mapping[str, Any],
    form: Format,
) -> dict[str, Any]:
    """Export a network, and check the exported programs on real images; the folder is complete or does not appear.

    Args:
        network: the network, adapted and trained, on the CPU.
        rule: who leaves where: an exit rule, or a policy.
        out: the folder, which must not exist.
        images: at least one image, normalised [N, *input_shape].
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
    network, rule = (rule if isinstance(rule, ExitPolicy) else ExitPolicy(rule)).placed_in(network)
    if form == "onnx" and (missing := missing_packages()):
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install 'exitkit[onnx]'; or use torch-export")
    make_folder(out.parent)
    try:
        with drafted(out) as draft:
            policy = _write(without_taps(network), rule, draft, images, about, form)
            check(draft, network, rule, images)
            draft.rename(out)
    except OSError as error:
        raise disk_error(out, error) from None
    return policy


def _write(
    network: MultiExitNetwork,
    rule: PointRule | ExitPolicy,
    folder: Path,
    images: Tensor,
    about: Mapping[str, Any],
    form: Format,
) -> dict[str, Any]:
    ending = ENDINGS[form]
    programs, two = [], images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)  # one would fix the batch size
    for number, piece in enumerate(pieces(network, two), start=1):
        programs.append(f"stage-{number}{ending}")
        write_program(piece, folder / programs[-1], form)
    write_program(all_exits(network, two), folder / f"all-exits{ending}", form)
    facts = {"format": form, "programs": programs, "all_exits": f"all-exits{ending}"}
    policy: dict[str, Any] = (
        json.loads(rule.to_json()) | facts | {"input_shape": list(network.input_shape)} | dict(about)
    )
    write_json(folder / "policy.json", policy)
    return complete(folder, images.numpy())


@torch.inference_mode()
def check(folder: Path, network: MultiExitNetwork, rule: PointRule | ExitPolicy, images: Tensor) -> None:
    """Compare the exported programs with the network on real images: the logits of all exits, and the exits used.

    An image may leave at another exit only if changes of the logits by up to `TOLERANCE` move its exit in the network.

    Raises:
        UserError: they differ.
    """
    expected = torch.stack(network.eval()(images).logits, 1)
    written = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    all_logits = np.stack(runner.load(folder / written["all_exits"])([images.numpy()]), 1)
    _compare("all exits at once", all_logits, expected.numpy())
    exported = runner.Runner(folder)
    _compare("exit by exit", logits_by_stage(exported, images.numpy()), expected.numpy())
    policy = rule if isinstance(rule, ExitPolicy) else ExitPolicy(rule)
    exits = policy.on_outputs(expected)[1]
    differs = torch.from_numpy(exported(images.numpy())[1]) != exits
    if differs.any():
        noise = torch.Generator().manual_seed(0)
        size = TOLERANCE * expected.abs().max()
        for _ in range(_CHANGES):
            changed = expected + size * (2 * torch.rand(expected.shape, generator=noise) - 1)
            differs &= policy.on_outputs(changed)[1] == exits
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
