"""Adaptive inference: early exit that saves computation, for any backbone and method.

The network runs stage by stage, each executed by an engine (`exitkit.inference.engines`): at each exit the samples that
leave get their predictions, their rows are dropped from the state, the logit link's carry and the policy's memory, and
the others continue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from exitkit.errors import UserError, unknown
from exitkit.inference.engines import ENGINES, InferenceEngine, Step, prepare
from exitkit.inference.policy import ExitPolicy
from exitkit.inference.rule import PointRule
from exitkit.networks.cascade import MultiExitNetwork, map_tensors
from exitkit.networks.inputs import check_cascade, check_images, reference_tensor


class Answers(NamedTuple):
    """Predictions for a batch of N images.

    Attributes:
        logits: [N, C], of the exit where each image leaves, in the images' dtype; of a policy with a combination, the
            combination's log-probabilities.
        exits: [N], that exit, from 0.
    """

    logits: Tensor
    exits: Tensor

    @property
    def classes(self) -> Tensor:
        """The predicted classes [N]."""
        return self.logits.argmax(1)


class _Waiting(NamedTuple):
    """Samples before a stage: their numbers [n], and their rows of the state, the carry and the policy's memory."""

    rows: Tensor
    tensors: Any

    def at(self, chosen: slice) -> _Waiting:
        """Return a slice of the samples."""
        return _Waiting(self.rows[chosen], map_tensors(lambda tensor: tensor[chosen], self.tensors))


@dataclass
class _Pending:
    """A batch of a stream, and the number of its samples without a prediction."""

    answers: Answers
    missing: int

    def fill(self, places: Tensor, logits: Tensor, index: int) -> None:
        """Store the predictions of the samples that leave at an exit."""
        self.answers.logits[places] = logits.to(self.answers.logits.dtype)  # autocast's have another dtype
        self.answers.exits[places] = index
        self.missing -= len(places)


def _pop_complete(pending: dict[int, _Pending]) -> Iterator[Answers]:
    """Remove and yield the batches that are complete, up to the first that is not."""
    while pending and not next(iter(pending.values())).missing:
        yield pending.pop(next(iter(pending))).answers


class AdaptiveInference:
    """Predicts images by a network with early exit, according to an exit rule or policy.

    The predictions are those of `leave_at` of the rule or policy on the outputs of all exits, as far as the arithmetic
    of a layer does not depend on the batch size.

    Args:
        network: any cascade, adapted and trained; it is put into evaluation mode.
        rule: who leaves where: an `ExitRule`, a rule of `exitkit.inference.rules` at one operating point, or an
            `ExitPolicy`, which may combine the outputs of the exits before the rule reads them.
        buckets: batch sizes to which the remaining images are padded (by repeating the last one), so that stages run
            on few shapes, as compiled stages need it (`exitkit.networks.compile_parts`); empty: no padding.
        engine: what executes the stages: `eager`, the network itself; `folded`, `compiled`, `onnx` or `auto`, see
            `exitkit.inference.engines`; or one that `engines.prepare` returned for this network, to share it.

    Attributes:
        engine: the prepared engine; the `choices` of `auto` are what it measured and chose per batch size.

    Raises:
        UserError: the rule is for another number of exits, a bucket is below 1, the engine is unknown or does not
            support the network, or the policy changes the network (see `ExitPolicy.placed_in`), and the engine is of
            the unchanged one.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        rule: PointRule | ExitPolicy,
        *,
        buckets: Sequence[int] = (),
        engine: str | InferenceEngine = "eager",
    ) -> None:
        check_cascade(network)
        if isinstance(rule, type) or not isinstance(getattr(rule, "exits", None), int):
            what = f"the class {rule.__name__}" if isinstance(rule, type) else f"a {type(rule).__name__}"
            raise UserError(f"rule is {what}; expected an ExitRule or an ExitPolicy, such as ExitRule.from_run(run)")
        self.network, self._policy = (rule if isinstance(rule, ExitPolicy) else ExitPolicy(rule)).placed_in(network)
        if not isinstance(buckets, Iterable) or not all(
            isinstance(size, Integral) and int(size) >= 1 for size in buckets
        ):
            raise UserError(f"buckets are {buckets!r}; expected a list of sizes of at least 1")
        self._reference = reference_tensor(network)
        self.rule = rule
        self.network.eval()
        if not isinstance(engine, str) and not hasattr(engine, "select"):
            raise unknown("engine", engine, (*ENGINES, "auto"))
        if self.network is not network and not isinstance(engine, str):
            raise UserError("this policy changes the network; give the engine by its name, or place the policy first")
        self.engine = prepare(self.network, engine) if isinstance(engine, str) else engine
        self._buckets = sorted(buckets)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Answers:
        """Predict images [N, *input_shape]; a stage that no image reaches is not computed.

        The images have the network's type and device, and are normalised as in training.

        Raises:
            UserError: they have another type, shape or device.
        """
        check_images(images, self.network.input_shape, self._reference)
        answers = self._blank(images)
        if not len(images):
            return answers
        step = self.engine.select(images, len(images))
        waiting: _Waiting | None = _Waiting(torch.arange(len(images), device=images.device), (images, None, None))
        for index in range(self.network.num_exits):
            if waiting is None:
                break
            leaving, waiting = self._step(step, index, waiting)
            if leaving is not None and len(leaving.rows) == len(images):  # a single image needs no bookkeeping
                return Answers(leaving.tensors.to(images.dtype), answers.exits.fill_(index))
            if leaving is not None:
                answers.logits[leaving.rows], answers.exits[leaving.rows] = leaving.tensors.to(images.dtype), index
        return answers

    @torch.inference_mode()
    def stream(self, batches: Iterable[Tensor], size: int) -> Iterator[Answers]:
        """Predict batches of images, with every stage running on `size` samples at once if that many wait before it.

        Samples that do not leave wait before the next stage until `size` samples of several batches have come
        together, so that the late stages run on full batches as well. Predictions are yielded in the order of the
        batches, each as soon as it is complete; after the last batch all waiting samples are predicted.

        Raises:
            UserError: a size below 1, or images of another type, shape or device than the network's.
        """
        if not isinstance(size, Integral) or size < 1:
            raise UserError(f"size is {size!r}; expected a whole number of at least 1")
        queues: list[list[_Waiting]] = [[] for _ in range(self.network.num_exits)]
        pending: dict[int, _Pending] = {}
        step: Step | None = None
        for number, images in enumerate(batches):
            check_images(images, self.network.input_shape, self._reference)
            pending[number] = _Pending(self._blank(images), len(images))
            if len(images):
                step = step or self.engine.select(images, size)
                places = torch.arange(len(images), device=images.device)
                rows = torch.stack([torch.full_like(places, number), places], 1)
                queues[0].append(_Waiting(rows, (images, None, None)))
                self._drain(step, queues, pending, size)
            yield from _pop_complete(pending)
        if step is not None:
            self._drain(step, queues, pending, size, all_of_them=True)
        yield from _pop_complete(pending)

    def _drain(
        self,
        step: Step,
        queues: list[list[_Waiting]],
        pending: dict[int, _Pending],
        size: int,
        *,
        all_of_them: bool = False,
    ) -> None:
        """Run each stage in order on `size` samples, as long as that many wait before it (with `all_of_them`, any)."""
        for index, queue in enumerate(queues):
            while queue and (all_of_them or sum(len(waiting.rows) for waiting in queue) >= size):
                merged = _merge(queue)
                queue[:] = [merged.at(slice(size, None))] if len(merged.rows) > size else []
                leaving, remaining = self._step(step, index, merged.at(slice(size)))
                if leaving is not None:
                    for number in leaving.rows[:, 0].unique().tolist():
                        selected = leaving.rows[:, 0] == number
                        pending[number].fill(leaving.rows[selected, 1], leaving.tensors[selected], index)
                if remaining is not None:
                    queues[index + 1].append(remaining)

    def _blank(self, images: Tensor) -> Answers:
        logits = images.new_empty(len(images), self.network.num_classes)
        return Answers(logits, torch.zeros(len(images), dtype=torch.int64, device=images.device))

    def _step(self, step: Step, index: int, waiting: _Waiting) -> tuple[_Waiting | None, _Waiting | None]:
        """Return the samples that leave at an exit, with their logits, and those that continue; None for no samples."""
        count = len(waiting.rows)
        state, carry, memory = waiting.tensors
        if self._buckets:
            state, carry = self._padded((state, carry), count)
        outputs, state, carry = step(index, state, carry)
        own = outputs[:count] if self._buckets else outputs
        logits, leaves, memory = self._policy.decide(index, own, memory)
        leave_count = int(leaves.sum())
        if leave_count == count:
            return _Waiting(waiting.rows, logits), None
        if len(outputs) == count and not leave_count:  # nothing has to be copied
            return None, _Waiting(waiting.rows, (state, carry, memory))
        leaving, remaining = (mask.nonzero().squeeze(1).to(logits.device) for mask in (leaves, ~leaves))
        tensors = map_tensors(lambda tensor: _take(tensor, remaining), (state, carry, memory))
        return _Waiting(waiting.rows[leaving], logits[leaving]), _Waiting(waiting.rows[remaining], tensors)

    def _padded(self, tensors: Any, count: int) -> Any:
        """Return the tensors, padded to the next bucket by repeating their last row."""
        size = next((bucket for bucket in self._buckets if bucket >= count), count)
        if size == count:
            return tensors
        return map_tensors(lambda t: torch.cat([t, t[-1:].expand(size - count, *t.shape[1:])]), tensors)


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of a tensor, in its memory layout: `index_select` alone makes a channels-last one contiguous."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows)


def _merge(queue: Sequence[_Waiting]) -> _Waiting:
    """Return several groups of waiting samples as one group."""
    if len(queue) == 1:
        return queue[0]
    tensors = pytree.tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0],
        *(waiting.tensors for waiting in queue),
    )
    return _Waiting(torch.cat([waiting.rows for waiting in queue]), tensors)
