"""Inference engines: how the stages of a network are executed. Who leaves at an exit is the rule's part.

| engine | a stage is |
|---|---|
| eager | `MultiExitNetwork.step` of the network itself |
| folded | that of a folded copy (`exitkit.networks.fold`), which is channels-last on CPUs |
| compiled | a program of `torch.export`, compiled by `torch.compile` when it first runs |
| onnx | a session of onnxruntime, with torch's number of threads (CPUs only, needs the extra `onnx`) |
| auto | that of the engine that a short measurement finds to be the fastest for the batch size |

All but `eager` are made from a copy: they do not follow later changes of the network's weights. Their outputs differ
from the network's in the last digits.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from exitkit.engine.devices import synchronise
from exitkit.errors import Note, UserError, unknown
from exitkit.inference.export.programs import Piece, exported, missing_packages, pieces, write_program
from exitkit.inference.policy import ExitPolicy
from exitkit.inference.rule import PointRule
from exitkit.networks.cascade import Carry, MultiExitNetwork, State
from exitkit.networks.folding import fold

Step = Callable[[int, State, Carry], tuple[Tensor, State, Carry]]
"""(stage, state, carry) -> the exit's logits [N, C], and the state and carry for the next stage."""
_TOLERANCE = 1e-4
"""Largest difference of an engine's logits, in units of the largest logit; fp32 gives about 1e-6."""
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 20
_SECONDS = 0.5
"""How long `auto` measures one batch size, unless the least number of rounds takes longer."""


class InferenceEngine(Protocol):
    """What executes the stages for `AdaptiveInference`; `prepare` makes one."""

    @property
    def name(self) -> str:
        """One of `ENGINES`, or auto."""

    def select(self, images: Tensor, size: int) -> Step:
        """Return the function that runs a stage on batches of `size` images, such as these [N, *input_shape]."""


@dataclass(frozen=True)
class FixedEngine:
    """An engine that runs all batches in the same way."""

    name: str
    step: Step

    def select(self, images: Tensor, size: int) -> Step:
        """Return the function that runs a stage."""
        return self.step


class Choice(NamedTuple):
    """What `auto` chose for a batch size: the name of the fastest engine, and the seconds of each through all exits."""

    engine: str
    seconds: dict[str, float]


@dataclass
class AutoEngine:
    """Chooses an engine per batch size, by a short measurement on the first batch of that size.

    Batch sizes are rounded up to powers of two. `compiled` is left out, since it has to be compiled for minutes.
    """

    engines: Sequence[FixedEngine]
    exits: int
    choices: dict[int, Choice] = field(default_factory=dict)
    """{batch size: choice}, filled as batch sizes occur."""
    name: str = "auto"

    def select(self, images: Tensor, size: int) -> Step:
        """Return the function of the fastest engine for such batches."""
        best = self.choice(images, size).engine
        return next(engine.step for engine in self.engines if engine.name == best)

    def choice(self, images: Tensor, size: int) -> Choice:
        """Return the choice for batches of `size` images, such as these; measure it if the size is new."""
        rounded = 1 << (size - 1).bit_length()
        if rounded not in self.choices:
            batch = images[torch.arange(size, device=images.device) % len(images)]
            self.choices[rounded] = fastest({engine.name: engine.step for engine in self.engines}, batch, self.exits)
        return self.choices[rounded]


def prepare(network: MultiExitNetwork, engine: str = "auto") -> InferenceEngine:
    """Return an engine for a network. Engines that `AdaptiveInference` objects share are prepared once.

    Args:
        network: any cascade, adapted and trained; it is put into evaluation mode.
        engine: one of `ENGINES`, or `auto`.

    Raises:
        UserError: the engine is unknown, not installed, or does not support the network or its device.
    """
    if engine != "auto":
        return fixed(network, engine)
    engines = [fixed(network, name) for name in ("eager", "folded")]
    if _device(network).type == "cpu" and not missing_packages():
        try:
            engines.append(fixed(network, "onnx"))
        except UserError as error:
            warnings.warn(Note(f"the engine auto leaves out onnx: {error}"), stacklevel=2)
    return AutoEngine(engines, network.num_exits)


def fixed(network: MultiExitNetwork, engine: str) -> FixedEngine:
    """Return one of `ENGINES` for a network; see `prepare`."""
    if engine not in ENGINES:
        raise unknown("engine", engine, (*ENGINES, "auto"))
    return FixedEngine(engine, _PREPARED[engine](network.eval()))


def _eager(network: MultiExitNetwork) -> Step:
    def step(index: int, state: State, carry: Carry) -> tuple[Tensor, State, Carry]:
        output, state, carry = network.step(index, state, carry)
        return output.logits, state, carry

    return step


def _folded(network: MultiExitNetwork) -> Step:
    folded, channels_last = _fast_copy(network)
    step = _eager(folded)

    def converted(index: int, state: State, carry: Carry) -> tuple[Tensor, State, Carry]:
        return step(index, state if index else state.contiguous(memory_format=torch.channels_last), carry)

    return converted if channels_last else step


def _fast_copy(network: MultiExitNetwork) -> tuple[MultiExitNetwork, bool]:
    """Return a folded copy, and whether it is channels-last."""
    folded = fold(network)
    # All families gain on CPUs; other devices were not measured.
    channels_last = _device(network).type == "cpu"
    if channels_last:
        folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return folded, channels_last


def _compiled(network: MultiExitNetwork) -> Step:
    folded, channels_last = _fast_copy(network)
    images = _two_images(network)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    parts = [exported(piece, f"stage {number}").module() for number, piece in enumerate(pieces(folded, images), 1)]
    step = _of_programs([torch.compile(part, dynamic=True) for part in parts], channels_last)
    try:
        run_all(step, network.num_exits, images)
    except Exception as error:  # the compiler raises errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"torch can't compile the network: {type(error).__name__}: {reason}") from error
    return step


def _onnx(network: MultiExitNetwork) -> Step:
    if _device(network).type != "cpu":
        raise UserError(f"the engine onnx runs on CPUs; expected another engine for a network on {_device(network)}")
    if missing := missing_packages():
        raise UserError(f"the engine onnx needs {' and '.join(missing)}: pip install 'exitkit[onnx]'")
    return _of_programs([onnx_program(piece) for piece in pieces(fold(network), _two_images(network))], False)


def onnx_program(piece: Piece) -> Callable[..., Sequence[Tensor]]:
    """Return a piece as an onnxruntime session: a function of tensors, which are copied neither in nor out.

    Raises:
        UserError: torch can't export the piece.
    """
    # Imported when used: an extra.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    with TemporaryDirectory() as folder:
        path = Path(folder, f"{piece.names[1][0]}.onnx")
        write_program(piece, path, "onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs, outputs = piece.names

    def program(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(outputs, arrays)]

    return program


def _of_programs(programs: Sequence[Callable[..., Sequence[Tensor]]], channels_last: bool) -> Step:
    """Return the step of programs from tensors to tensors; all tensors of state and carry are the next one's inputs."""

    def step(index: int, state: State, carry: Carry) -> tuple[Tensor, State, Carry]:
        if index == 0:
            state = [state.contiguous(memory_format=torch.channels_last) if channels_last else state]
        logits, *state = programs[index](*state)
        return logits, state, None

    return step


_PREPARED: dict[str, Callable[[MultiExitNetwork], Step]] = {
    "eager": _eager,
    "folded": _folded,
    "compiled": _compiled,
    "onnx": _onnx,
}
ENGINES = tuple(_PREPARED)
"""Names of the engines, besides auto."""


def run_all(step: Step, exits: int, images: Tensor) -> list[Tensor]:
    """Run all stages on all images, and return the logits of every exit, [N, C] each."""
    outputs, state, carry = [], images, None
    for index in range(exits):
        logits, state, carry = step(index, state, carry)
        outputs.append(logits)
    return outputs


@torch.inference_mode()
def fastest(steps: Mapping[str, Step], images: Tensor, exits: int) -> Choice:
    """Run engines alternately through all exits for about half a second, and return the one of the lowest median."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    for number in range(-1, _MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - began > _SECONDS:
            break
        for name, step in steps.items():
            start = _now(images)
            run_all(step, exits, images)
            if number >= 0:  # the first round is warm-up
                times[name].append(_now(images) - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return Choice(min(seconds, key=seconds.__getitem__), seconds)


def _now(images: Tensor) -> float:
    synchronise(images.device)
    return time.perf_counter()


def _device(network: MultiExitNetwork) -> torch.device:
    return next(network.parameters()).device


def _two_images(network: MultiExitNetwork) -> Tensor:
    """Return blank images from which a program learns the shapes."""
    return next(network.parameters()).new_zeros(2, *network.input_shape)


class Moved(NamedTuple):
    """How an engine's outputs differ from the network's.

    Attributes:
        images: number of compared images.
        moved: images that leave at another exit, because a score is so near to its threshold.
        difference: the largest difference of a logit, in units of the largest logit.
    """

    images: int
    moved: int
    difference: float


@torch.inference_mode()
def compare(network: MultiExitNetwork, engine: InferenceEngine, rule: PointRule | ExitPolicy, images: Tensor) -> Moved:
    """Compare an engine with the network on images [N, *input_shape], under an exit rule.

    Raises:
        UserError: a logit differs by more than 1e-4 of the largest one: the engine computes something else.
    """
    expected = [output.logits for output in network.eval().iterate(images)]
    actual = run_all(engine.select(images, len(images)), network.num_exits, images)
    largest = max(float(logits.abs().max()) for logits in expected)
    pairs = zip(actual, expected, strict=True)
    difference = max(float((one - other).abs().max()) for one, other in pairs) / max(largest, 1e-12)
    if not difference <= _TOLERANCE:
        raise UserError(
            f"the engine {engine.name} differs by {difference:.2g} of the largest logit; use another engine"
        )
    policy = rule if isinstance(rule, ExitPolicy) else ExitPolicy(rule)
    exits, expected_exits = (policy.on_outputs(torch.stack(outputs, 1))[1] for outputs in (actual, expected))
    return Moved(len(images), int((exits != expected_exits).sum()), difference)
