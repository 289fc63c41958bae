"""Running a network so that what is answered is computed no further: real early exit, for any backbone and method.

One chain serves all (`MultiExitNetwork.step`): after each exit the samples that leave are answered, their rows are
dropped from the state, from what the logit link carries on and from what the rule remembers, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from exitkit.errors import UserError
from exitkit.inference.rule import ExitRule
from exitkit.networks.cascade import MultiExitNetwork, map_tensors


class Answers(NamedTuple):
    """What a batch of N images was answered.

    Attributes:
        logits: [N, C], of the exit where each image left, in the images' precision.
        exits: [N], that exit, from 0.
    """

    logits: Tensor
    exits: Tensor

    @property
    def classes(self) -> Tensor:
        """The predicted classes [N]."""
        return self.logits.argmax(1)


class _Waiting(NamedTuple):
    """Samples before a stage: which they are [n], and their rows of the state, the link's carry, the rule's memory."""

    rows: Tensor
    tensors: Any

    def at(self, chosen: slice) -> _Waiting:
        """Return some of them."""
        return _Waiting(self.rows[chosen], map_tensors(lambda tensor: tensor[chosen], self.tensors))


@dataclass
class _Pending:
    """A batch of a stream, of which some samples are still to be answered."""

    answers: Answers
    missing: int

    def fill(self, places: Tensor, logits: Tensor, index: int) -> None:
        """Write down what the samples at some places were answered at an exit."""
        self.answers.logits[places] = logits.to(self.answers.logits.dtype)  # autocast's are of another
        self.answers.exits[places] = index
        self.missing -= len(places)


def _whole(pending: dict[int, _Pending]) -> Iterator[Answers]:
    """Take out and give the batches that are answered, up to the first that is not."""
    while pending and not next(iter(pending.values())).missing:
        yield pending.pop(next(iter(pending))).answers


class AdaptiveInference:
    """Answers images by a network that stops early where its rule says so.

    The answers are those of the decide-afterwards evaluation (`exitkit.inference.thresholds.leave_at` on all exits' outputs), as
    far as the arithmetic of a layer does not depend on how many images it is given.

    Args:
        network: any cascade, adapted and trained; it is put into evaluation mode.
        rule: who leaves where.
        buckets: sizes to which the images that go on are filled up (by repeating one), so that stages see few shapes:
            for compiled stages (`exitkit.networks.compile_parts`); none: nothing is filled up.

    Raises:
        UserError: a rule for another number of exits, or buckets that are no positive sizes.
    """

    def __init__(self, network: MultiExitNetwork, rule: ExitRule, *, buckets: Sequence[int] = ()) -> None:
        if len(rule.thresholds) != network.num_exits:
            raise UserError(
                f"the rule has {len(rule.thresholds)} thresholds; expected {network.num_exits}, one an exit"
            )
        if any(size < 1 for size in buckets):
            raise UserError(f"buckets are {list(buckets)}; expected sizes of at least 1")
        self.network = network.eval()
        self.rule = rule
        self._buckets = sorted(buckets)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Answers:
        """Answer images [N, *input_shape]; nothing is computed for a stage that no image reaches."""
        answers = self._blank(images)
        waiting: _Waiting | None = _Waiting(torch.arange(len(images), device=images.device), (images, None, None))
        for index in range(self.network.num_exits if len(images) else 0):
            if waiting is None:
                break
            left, waiting = self._step(index, waiting)
            if left is not None and len(left.rows) == len(images):  # so that a single image pays for no bookkeeping
                return Answers(left.tensors.to(images.dtype), answers.exits.fill_(index))
            if left is not None:
                answers.logits[left.rows], answers.exits[left.rows] = left.tensors.to(images.dtype), index
        return answers

    @torch.inference_mode()
    def stream(self, batches: Iterable[Tensor], size: int) -> Iterator[Answers]:
        """Answer batches of images, every stage on `size` samples at once wherever so many wait before it.

        Samples that go on wait before the next stage until enough have come together from several batches, so that the
        deep stages run as full as the first. Answers come in the order of the batches, each as soon as it is whole;
        with the last batch all that still wait are answered.

        Raises:
            UserError: a size below 1.
        """
        if size < 1:
            raise UserError(f"size is {size}; expected at least 1")
        queues: list[list[_Waiting]] = [[] for _ in range(self.network.num_exits)]
        pending: dict[int, _Pending] = {}
        for number, images in enumerate(batches):
            pending[number] = _Pending(self._blank(images), len(images))
            places = torch.arange(len(images), device=images.device)
            rows = torch.stack([torch.full_like(places, number), places], 1)
            queues[0] += [_Waiting(rows, (images, None, None))] if len(images) else []
            self._drain(queues, pending, size)
            yield from _whole(pending)
        self._drain(queues, pending, size, all_of_them=True)
        yield from _whole(pending)

    def _drain(
        self, queues: list[list[_Waiting]], pending: dict[int, _Pending], size: int, *, all_of_them: bool = False
    ) -> None:
        """Run each stage, the first one first, on `size` samples as long as so many wait before it (or any do)."""
        for index, queue in enumerate(queues):
            while queue and (all_of_them or sum(len(waiting.rows) for waiting in queue) >= size):
                together = _together(queue)
                queue[:] = [together.at(slice(size, None))] if len(together.rows) > size else []
                left, rest = self._step(index, together.at(slice(size)))
                if left is not None:
                    for number in left.rows[:, 0].unique().tolist():
                        mine = left.rows[:, 0] == number
                        pending[number].fill(left.rows[mine, 1], left.tensors[mine], index)
                if rest is not None:
                    queues[index + 1].append(rest)

    def _blank(self, images: Tensor) -> Answers:
        logits = images.new_empty(len(images), self.network.num_classes)
        return Answers(logits, torch.zeros(len(images), dtype=torch.int64, device=images.device))

    def _step(self, index: int, waiting: _Waiting) -> tuple[_Waiting | None, _Waiting | None]:
        """Return who leaves at an exit, with their logits, and who goes on; None for nobody."""
        count = len(waiting.rows)
        state, carry, memory = waiting.tensors
        if self._buckets:
            state, carry = self._filled((state, carry), count)
        output, state, carry = self.network.step(index, state, carry)
        logits = output.logits[:count] if self._buckets else output.logits
        leaves, memory = self.rule.leaving(index, logits, memory)
        leaving = int(leaves.sum())
        if leaving == count:
            return _Waiting(waiting.rows, logits), None
        if len(output.logits) == count and not leaving:  # nothing has to be copied
            return None, _Waiting(waiting.rows, (state, carry, memory))
        gone, stay = (mask.nonzero().squeeze(1).to(logits.device) for mask in (leaves, ~leaves))
        on = map_tensors(lambda tensor: tensor.index_select(0, stay), (state, carry, memory))
        return _Waiting(waiting.rows[gone], logits[gone]), _Waiting(waiting.rows[stay], on)

    def _filled(self, tensors: Any, count: int) -> Any:
        """Return the tensors with their last row repeated up to the next bucket."""
        size = next((bucket for bucket in self._buckets if bucket >= count), count)
        if size == count:
            return tensors
        return map_tensors(lambda t: torch.cat([t, t[-1:].expand(size - count, *t.shape[1:])]), tensors)


def _together(queue: Sequence[_Waiting]) -> _Waiting:
    """Return those who wait in several groups as one group."""
    if len(queue) == 1:
        return queue[0]
    tensors = pytree.tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0],
        *(waiting.tensors for waiting in queue),
    )
    return _Waiting(torch.cat([waiting.rows for waiting in queue]), tensors)
